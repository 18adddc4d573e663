//! Deletes published outbox rows and inbox rows after a while, in small batches.
//!
//! These rows are not needed for correctness: repetitions are recognised by business rows and keys,
//! which are kept.

use std::time::Duration;

use sea_orm::{DbErr, FromQueryResult};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::database::Database;
use crate::postgres::{execute, one_row, sql, within};
use crate::scan::id_at;

/// Maximum number of rows per statement: keeps locks and rollbacks short.
const BATCH_MAX: i64 = 1000;
/// Pause between two statements while more rows are old, so that live traffic has priority.
const BATCH_PAUSE: Duration = Duration::from_millis(50);
/// A batch that hangs, for example on a dead connection, is aborted.
const BATCH_TIMEOUT: Duration = Duration::from_secs(20);
const INTERVAL_MAX: Duration = Duration::from_secs(60);

pub(crate) struct Retention {
    pub(crate) db: Database,
    pub(crate) consumers: Vec<&'static str>,
    /// Retention period of the rows.
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
                    // The batch was not full: no more rows are old enough.
                    let is_full = deleted >= BATCH_MAX.unsigned_abs();
                    if is_full { BATCH_PAUSE } else { interval }
                }
                Err(error) => {
                    warn!(error = %error, "Old rows could not be deleted; retrying");
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
    /// Only the database's clock decides: the clock of one process may be wrong by any amount.
    /// Event ids are generated in time order, so old rows are at one end of the primary key, and no
    /// index on a time is needed. A young row with an old id (a re-ask) is skipped until it is old
    /// itself.
    async fn prune_batch(&self) -> Result<u64, DbErr> {
        let keep = || self.keep.as_secs_f64().into();
        let oldest_kept = id_at("now() - make_interval(secs => $1)");
        // The time is recorded in the same statement, so that the audit does not report deleted
        // rows as missing.
        let outbox = format!(
            "WITH gone AS (
                 DELETE FROM outbox WHERE (event_id, n) IN (
                     SELECT event_id, n FROM outbox
                     WHERE event_id < {oldest_kept}
                       AND published_at < now() - make_interval(secs => $1)
                     ORDER BY event_id, n LIMIT $2 FOR UPDATE SKIP LOCKED)
                 RETURNING 1),
             noted AS (
                 UPDATE retention
                 SET outbox_before = greatest(outbox_before, now() - make_interval(secs => $1))
                 WHERE EXISTS (SELECT FROM gone))
             SELECT count(*) AS rows FROM gone"
        );
        let outbox = sql(&outbox, [keep(), BATCH_MAX.into()]);
        let Deleted { rows } = one_row(&self.db, outbox).await?;
        let mut total = rows.unsigned_abs();
        for consumer in &self.consumers {
            let inbox = format!(
                "DELETE FROM inbox WHERE consumer = $3 AND event_id IN (
                     SELECT event_id FROM inbox
                     WHERE consumer = $3 AND event_id < {oldest_kept}
                       AND received_at < now() - make_interval(secs => $1)
                       AND (last_repeat_at IS NULL
                            OR last_repeat_at < now() - make_interval(secs => $1))
                     ORDER BY event_id LIMIT $2 FOR UPDATE SKIP LOCKED)"
            );
            let inbox = sql(&inbox, [keep(), BATCH_MAX.into(), (*consumer).into()]);
            total += execute(&self.db, inbox).await?;
        }
        Ok(total)
    }
}
