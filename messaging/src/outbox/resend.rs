//! Publishing again what was published before, when an operator asks for it.

use std::time::Duration;

use sea_orm::{ConnectionTrait as _, DatabaseConnection, DbErr, FromQueryResult};
use time::OffsetDateTime;

use crate::postgres::{clock, one_row, sql};

/// Rows that one statement changes.
const BATCH: i64 = 1000;

/// Which published events to publish again, under the same ids. For readers of the streams, after
/// the broker has lost messages.
#[derive(Clone, Debug)]
pub struct Resend<'a> {
    pub since: OffsetDateTime,
    /// Only events on this subject.
    pub subject: Option<&'a str>,
}

#[derive(FromQueryResult)]
struct Count {
    number: i64,
}

impl Resend<'_> {
    pub async fn count(&self, db: &DatabaseConnection) -> Result<u64, DbErr> {
        self.count_since(db, self.since).await
    }

    /// How many of them the broker may still remember: it does not store these twice.
    pub async fn count_remembered(
        &self,
        db: &DatabaseConnection,
        duplicate_window: Duration,
    ) -> Result<u64, DbErr> {
        let remembered_since = clock(db).await? - duplicate_window;
        self.count_since(db, self.since.max(remembered_since)).await
    }

    async fn count_since(
        &self,
        db: &DatabaseConnection,
        since: OffsetDateTime,
    ) -> Result<u64, DbErr> {
        let query = sql(
            "SELECT count(*) AS number FROM outbox
             WHERE published_at >= $1 AND ($2::text IS NULL OR subject = $2)",
            [since.into(), self.subject.into()],
        );
        let Count { number } = one_row(db, query).await?;
        Ok(number.unsigned_abs())
    }

    /// Marks the rows as waiting, so that a relay publishes them. Returns how many there were.
    pub async fn run(&self, db: &DatabaseConnection) -> Result<u64, DbErr> {
        let begun = clock(db).await?;
        let mut total = 0;
        loop {
            let update = sql(
                "UPDATE outbox SET published_at = NULL, stream_sequence = NULL
                 WHERE (event_id, n) IN (
                     SELECT event_id, n FROM outbox
                     WHERE published_at >= $1 AND published_at < $2
                       AND ($3::text IS NULL OR subject = $3)
                     ORDER BY event_id, n LIMIT $4 FOR UPDATE SKIP LOCKED)",
                [
                    self.since.into(),
                    begun.into(),
                    self.subject.into(),
                    BATCH.into(),
                ],
            );
            let updated = db.execute_raw(update).await?.rows_affected();
            total += updated;
            if updated < BATCH.unsigned_abs() {
                return Ok(total);
            }
        }
    }
}
