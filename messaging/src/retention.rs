//! Takes away what is no longer needed: outbox rows that were published and inbox rows, after a while, in small batches.
//!
//! Correctness needs neither: decisions, transfers, orders and keys are what recognises a repetition, and they stay.

use std::time::Duration;

use sea_orm::{ConnectionTrait as _, DatabaseConnection, DbErr};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};
use uuid::{NoContext, Timestamp, Uuid};

use crate::db::{self, sql};

/// Rows in one statement: short locks, little to undo.
const BATCH_MAX: u64 = 1000;
/// Between two statements while there is more, so that the flow goes first.
const BATCH_PAUSE: Duration = Duration::from_millis(50);
/// A batch that hangs (a connection into nothing) is given up.
const BATCH_TIMEOUT: Duration = Duration::from_secs(20);
const LOOK_INTERVAL_MAX: Duration = Duration::from_secs(60);

/// What is taken away when.
#[derive(Clone, Debug)]
pub struct Retention {
    /// Pool of the flow.
    pub db: DatabaseConnection,
    /// The consumer whose inbox it is.
    pub consumer: &'static str,
    /// How long rows are kept.
    pub keep: Duration,
}

impl Retention {
    /// Prunes until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        let interval = LOOK_INTERVAL_MAX.min(self.keep / 2).max(BATCH_PAUSE);
        loop {
            let pause = match db::within(BATCH_TIMEOUT, self.prune_batch()).await {
                Ok(pruned) => {
                    debug!(rows = pruned, "Old outbox and inbox rows pruned");
                    // Less than a full batch: there is nothing more for now.
                    if pruned >= BATCH_MAX {
                        BATCH_PAUSE
                    } else {
                        interval
                    }
                }
                Err(error) => {
                    warn!(error = %error, "Old rows could not be pruned; trying again");
                    interval
                }
            };
            if shutdown
                .run_until_cancelled(tokio::time::sleep(pause))
                .await
                .is_none()
            {
                return Ok(());
            }
        }
    }

    /// One step; says how many rows it took away.
    ///
    /// Event ids are made in time order, so the old ones are one end of the primary key: no index on a time is needed.
    /// A row that is young under an old id (a re-ask) is passed over until it is old itself.
    pub async fn prune_batch(&self) -> Result<u64, DbErr> {
        let before = db::now() - self.keep;
        let seconds = u64::try_from(before.unix_timestamp()).unwrap_or(0);
        let id_before = Uuid::new_v7(Timestamp::from_unix(
            NoContext,
            seconds,
            before.nanosecond(),
        ));
        // Noted with it, so that an audit does not miss what is gone.
        let outbox = self
            .db
            .query_one_raw(sql(
                "WITH gone AS (
                     DELETE FROM outbox WHERE (event_id, n) IN (
                         SELECT event_id, n FROM outbox WHERE event_id < $1 AND published_at < $2 ORDER BY event_id, n LIMIT $3
                         FOR UPDATE SKIP LOCKED)
                     RETURNING 1),
                 noted AS (
                     UPDATE retention SET outbox_before = greatest(outbox_before, $2) WHERE EXISTS (SELECT FROM gone))
                 SELECT count(*) AS rows FROM gone",
                [id_before.into(), before.into(), (BATCH_MAX as i64).into()],
            ))
            .await?
            .map_or(Ok(0), |row| row.try_get::<i64>("", "rows"))?;
        let inbox = self
            .db
            .execute_raw(sql(
                "DELETE FROM inbox WHERE consumer = $1 AND event_id IN (
                     SELECT event_id FROM inbox WHERE consumer = $1 AND event_id < $2 AND received_at < $3
                     AND (last_repeat_at IS NULL OR last_repeat_at < $3) ORDER BY event_id LIMIT $4 FOR UPDATE SKIP LOCKED)",
                [self.consumer.into(), id_before.into(), before.into(), (BATCH_MAX as i64).into()],
            ))
            .await?;
        Ok(outbox.unsigned_abs() + inbox.rows_affected())
    }
}
