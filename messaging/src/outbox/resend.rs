//! Publishes old events again on request of an operator.

use std::time::Duration;

use sea_orm::{ConnectionTrait, DbErr, FromQueryResult};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::postgres::{clock, one_row, sql};
use crate::scan::id_at;

/// Maximum number of rows that one statement reads.
const BATCH: i64 = 1000;
/// Pause after each statement, so that live events have priority.
const PAUSE: Duration = Duration::from_millis(20);
/// Assumed maximum time between generating an event id and publishing the event. Events that were
/// pending for longer, or have an old id because they were re-asked, are not resent: the reconciler
/// re-asks for them.
const MINTED_BEFORE: Duration = Duration::from_secs(24 * 60 * 60);

/// Selects published events to publish again, under the same ids. For readers of the streams, after
/// the broker has lost messages.
#[derive(Clone, Debug)]
pub struct Resend<'a> {
    pub since: OffsetDateTime,
    /// Restricts the selection to this subject.
    pub subject: Option<&'a str>,
}

#[derive(FromQueryResult)]
struct Count {
    number: i64,
}

impl Resend<'_> {
    pub async fn count(&self, db: &impl ConnectionTrait) -> Result<u64, DbErr> {
        self.count_since(db, self.since).await
    }

    /// Number of selected events that the broker may still remember: it drops these as duplicates.
    pub async fn count_remembered(
        &self,
        db: &impl ConnectionTrait,
        duplicate_window: Duration,
    ) -> Result<u64, DbErr> {
        let remembered_since = clock(db).await? - duplicate_window;
        self.count_since(db, self.since.max(remembered_since)).await
    }

    async fn count_since(
        &self,
        db: &impl ConnectionTrait,
        since: OffsetDateTime,
    ) -> Result<u64, DbErr> {
        let from = id_at("$1::timestamptz - make_interval(secs => $3)");
        let query = format!(
            "SELECT count(*) AS number FROM outbox
             WHERE event_id >= {from} AND published_at >= $1
               AND ($2::text IS NULL OR subject = $2)"
        );
        let minted_before = MINTED_BEFORE.as_secs_f64();
        let query = sql(
            &query,
            [since.into(), self.subject.into(), minted_before.into()],
        );
        let Count { number } = one_row(db, query).await?;
        Ok(number.unsigned_abs())
    }

    /// Marks the rows as pending, so that a relay publishes them. Returns their number.
    ///
    /// Reads the table once, from the first possible id of the range. Relays publish these rows
    /// without delaying new events.
    pub async fn run(&self, db: &impl ConnectionTrait) -> Result<u64, DbErr> {
        let begun = clock(db).await?;
        let mut total = 0;
        let mut cursor = None;
        loop {
            let from = id_at("$1::timestamptz - make_interval(secs => $7)");
            let page = format!(
                "WITH page AS MATERIALIZED (
                     SELECT event_id, n FROM outbox
                     WHERE event_id >= {from} AND (event_id, n) > ($4, $5)
                     ORDER BY event_id, n LIMIT $6),
                 marked AS (
                     UPDATE outbox o SET published_at = NULL, stream_sequence = NULL
                     FROM page
                     WHERE o.event_id = page.event_id AND o.n = page.n
                       AND o.published_at >= $1 AND o.published_at < $2
                       AND ($3::text IS NULL OR o.subject = $3)
                     RETURNING 1)
                 SELECT event_id, n, (SELECT count(*) FROM marked) AS marked FROM page
                 ORDER BY event_id DESC, n DESC LIMIT 1"
            );
            let (event_id, n) = cursor.unwrap_or((Uuid::nil(), -1));
            let page = sql(
                &page,
                [
                    self.since.into(),
                    begun.into(),
                    self.subject.into(),
                    event_id.into(),
                    n.into(),
                    BATCH.into(),
                    MINTED_BEFORE.as_secs_f64().into(),
                ],
            );
            let Some(page) = Page::find_by_statement(page).one(db).await? else {
                return Ok(total);
            };
            total += page.marked.unsigned_abs();
            cursor = Some((page.event_id, page.n));
            if page.marked > 0 {
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// The last row that one statement has read, and the number of rows that it has marked.
#[derive(FromQueryResult)]
struct Page {
    event_id: Uuid,
    n: i32,
    marked: i64,
}
