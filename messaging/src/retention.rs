//! Deletes published outbox rows and inbox rows after a while, in small batches.
//!
//! Correctness needs neither: decisions, transfers, orders and keys are what recognises a
//! repetition, and they stay.

use std::time::Duration;

use sea_orm::{DatabaseConnection, DbErr, FromQueryResult};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};
use uuid::{NoContext, Timestamp, Uuid};

use crate::postgres::{execute, now, one_row, sql, within};

/// Rows of one statement: short locks, little to undo.
const BATCH_MAX: i64 = 1000;
/// Between two statements while there is more, so that the flow goes first.
const BATCH_PAUSE: Duration = Duration::from_millis(50);
/// A batch that hangs (a dead connection) is given up.
const BATCH_TIMEOUT: Duration = Duration::from_secs(20);
const INTERVAL_MAX: Duration = Duration::from_secs(60);

pub(crate) struct Retention {
    pub(crate) db: DatabaseConnection,
    pub(crate) consumers: Vec<&'static str>,
    /// How long rows are kept.
    pub(crate) keep: Duration,
}

#[derive(FromQueryResult)]
struct Deleted {
    rows: i64,
}

impl Retention {
    pub(crate) async fn run(&self, shutdown: &CancellationToken) {
        let interval = INTERVAL_MAX.min(self.keep / 2).max(BATCH_PAUSE);
        loop {
            let pause = match within(BATCH_TIMEOUT, self.prune_batch()).await {
                Ok(deleted) => {
                    debug!(rows = deleted, "Old outbox and inbox rows deleted");
                    // Less than a full batch: there is nothing more for now.
                    let is_full = deleted >= BATCH_MAX.unsigned_abs();
                    if is_full { BATCH_PAUSE } else { interval }
                }
                Err(error) => {
                    warn!(error = %error, "Old rows could not be deleted; trying again");
                    interval
                }
            };
            let pause = tokio::time::sleep(pause);
            if shutdown.run_until_cancelled(pause).await.is_none() {
                return;
            }
        }
    }

    /// One step. Returns how many rows it deleted.
    ///
    /// Event ids are minted in time order, so the old ones are one end of the primary key, and no
    /// index on a time is needed. A young row under an old id (a re-ask) is skipped until it is old
    /// itself.
    async fn prune_batch(&self) -> Result<u64, DbErr> {
        let before = now() - self.keep;
        let seconds = u64::try_from(before.unix_timestamp()).unwrap_or(0);
        let oldest_kept = Timestamp::from_unix(NoContext, seconds, before.nanosecond());
        let id_before = Uuid::new_v7(oldest_kept);
        // The time is noted with it, so that the audit does not miss what was deleted.
        let outbox = sql(
            "WITH gone AS (
                 DELETE FROM outbox WHERE (event_id, n) IN (
                     SELECT event_id, n FROM outbox
                     WHERE event_id < $1 AND published_at < $2
                     ORDER BY event_id, n LIMIT $3 FOR UPDATE SKIP LOCKED)
                 RETURNING 1),
             noted AS (
                 UPDATE retention SET outbox_before = greatest(outbox_before, $2)
                 WHERE EXISTS (SELECT FROM gone))
             SELECT count(*) AS rows FROM gone",
            [id_before.into(), before.into(), BATCH_MAX.into()],
        );
        let Deleted { rows } = one_row(&self.db, outbox).await?;
        let mut total = rows.unsigned_abs();
        for consumer in &self.consumers {
            let inbox = sql(
                "DELETE FROM inbox WHERE consumer = $1 AND event_id IN (
                     SELECT event_id FROM inbox
                     WHERE consumer = $1 AND event_id < $2 AND received_at < $3
                       AND (last_repeat_at IS NULL OR last_repeat_at < $3)
                     ORDER BY event_id LIMIT $4 FOR UPDATE SKIP LOCKED)",
                [
                    (*consumer).into(),
                    id_before.into(),
                    before.into(),
                    BATCH_MAX.into(),
                ],
            );
            total += execute(&self.db, inbox).await?;
        }
        Ok(total)
    }
}
