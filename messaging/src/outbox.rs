//! Facts that wait to be published. [`enqueue`] is the only writer of new rows and needs a transaction: a fact is
//! stored together with what it tells about, or not at all.

use std::time::Duration;

use failpoint::removed;
use sea_orm::entity::prelude::*;
use sea_orm::{DatabaseConnection, DatabaseTransaction, DbErr, FromQueryResult};
use serde_json::{Map, Value as Json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use shared_contracts::{Event, EventId, header};

use crate::db::{self, sql};
use crate::dead_letter;

/// An outbox row.
#[sea_orm::model]
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "outbox")]
pub struct Model {
    /// The fact.
    #[sea_orm(primary_key, auto_increment = false)]
    pub event_id: Uuid,
    /// 0 for the first sending, then 1, 2, ... for each time it is said again on purpose.
    #[sea_orm(primary_key, auto_increment = false)]
    pub n: i32,
    /// Where it is published.
    pub subject: String,
    /// Message headers, a JSON object of strings.
    pub headers: String,
    /// Message body, JSON.
    pub payload: String,
    /// How often publishing it was tried.
    pub attempts: i32,
    /// When the transaction that made it began.
    pub created_at: TimeDateTimeWithTimeZone,
    /// When its PubAck was recorded; none while it waits.
    pub published_at: Option<TimeDateTimeWithTimeZone>,
    /// Where the broker stored it, by the newest PubAck.
    pub stream_sequence: Option<i64>,
}

impl ActiveModelBehavior for ActiveModel {}

/// A fact ready to be enqueued.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    event_id: EventId,
    n: i32,
    subject: String,
    headers: String,
    payload: String,
}

impl Message {
    /// `event` said for the first time. `traceparent` ties it to the request or message that caused it.
    pub fn first<E: Event>(
        event_id: EventId,
        event: &E,
        at: OffsetDateTime,
        traceparent: Option<&str>,
    ) -> Self {
        Self::nth(event_id, 0, event, at, traceparent)
    }

    /// `event` said again: the n-th re-ask, with a de-duplication id of its own and the header `Gozon-Ask`.
    pub fn nth<E: Event>(
        event_id: EventId,
        n: u32,
        event: &E,
        at: OffsetDateTime,
        traceparent: Option<&str>,
    ) -> Self {
        let mut headers = Headers::new(E::TYPE, E::SOURCE, E::STREAM, at);
        headers.set(header::SUBJECT, event.order_id().to_string());
        if n > 0 {
            headers.set(header::ASK, n.to_string());
        }
        if let Some(traceparent) = traceparent {
            headers.set(header::TRACEPARENT, traceparent);
        }
        Self {
            event_id,
            n: i32::try_from(n).unwrap_or(i32::MAX),
            subject: E::SUBJECT.to_owned(),
            headers: headers.into_json(),
            payload: serde_json::to_string(event)
                .expect("an event is plain data, which always serializes"),
        }
    }

    /// Something that is no [`Event`] of the contracts: copies of dead letters, for tools.
    pub(crate) fn notice(
        subject: String,
        stream: &str,
        kind: &str,
        source: &str,
        at: OffsetDateTime,
        body: &Json,
    ) -> Self {
        Self {
            event_id: EventId::mint(),
            n: 0,
            subject,
            headers: Headers::new(kind, source, stream, at).into_json(),
            payload: body.to_string(),
        }
    }
}

struct Headers(Map<String, Json>);

impl Headers {
    fn new(kind: &str, source: &str, stream: &str, at: OffsetDateTime) -> Self {
        let mut headers = Self(Map::new());
        headers.set(header::TYPE, kind);
        headers.set(header::SOURCE, source);
        headers.set(
            header::TIME,
            at.format(&Rfc3339)
                .expect("a time of this millennium has an RFC 3339 form"),
        );
        headers.set(header::EXPECTED_STREAM, stream);
        headers
    }

    fn set(&mut self, name: &str, value: impl Into<String>) {
        self.0.insert(name.to_owned(), Json::String(value.into()));
    }

    fn into_json(self) -> String {
        Json::Object(self.0).to_string()
    }
}

/// Facts that a transaction has enqueued. After its commit they are handed to the relay, [`Outlet::hand_over`]; dropped,
/// they are found in the table.
///
/// [`Outlet::hand_over`]: crate::outlet::Outlet::hand_over
#[derive(Debug, Default)]
#[must_use = "handed to the relay after the commit, they are published without delay"]
pub struct Enqueued(pub(crate) Vec<Pending>);

/// Stores facts together with what they tell about.
pub async fn enqueue(
    txn: &DatabaseTransaction,
    mut messages: Vec<Message>,
) -> Result<Enqueued, DbErr> {
    if messages.is_empty() {
        return Ok(Enqueued::default());
    }
    messages.sort_by_key(|message| (message.event_id, message.n));
    let mut event_ids = Vec::with_capacity(messages.len());
    let mut ns = Vec::with_capacity(messages.len());
    let mut subjects = Vec::with_capacity(messages.len());
    let mut headers = Vec::with_capacity(messages.len());
    let mut payloads = Vec::with_capacity(messages.len());
    for message in &messages {
        event_ids.push(message.event_id.as_uuid());
        ns.push(message.n);
        subjects.push(message.subject.clone());
        headers.push(message.headers.clone());
        payloads.push(message.payload.clone());
    }
    // One statement text for any number of rows, so that it is prepared once per connection.
    db::execute(
        txn,
        sql(
            "INSERT INTO outbox (event_id, n, subject, headers, payload)
             SELECT * FROM unnest($1::uuid[], $2::integer[], $3::text[], $4::text[], $5::text[])",
            [
                event_ids.into(),
                ns.into(),
                subjects.into(),
                headers.into(),
                payloads.into(),
            ],
        ),
    )
    .await?;
    Ok(Enqueued(messages.into_iter().map(Pending::from).collect()))
}

/// What the relay needs of a row.
#[derive(Clone, Debug, FromQueryResult)]
pub(crate) struct Pending {
    pub(crate) event_id: Uuid,
    pub(crate) n: i32,
    pub(crate) subject: String,
    pub(crate) headers: String,
    pub(crate) payload: String,
}

impl From<Message> for Pending {
    fn from(message: Message) -> Self {
        let Message {
            event_id,
            n,
            subject,
            headers,
            payload,
        } = message;
        Self {
            event_id: event_id.as_uuid(),
            n,
            subject,
            headers,
            payload,
        }
    }
}

impl Pending {
    /// The broker swallows a repeated id, so what is said again on purpose gets a new one.
    pub(crate) fn message_id(&self) -> String {
        match self.n {
            0 => self.event_id.to_string(),
            _ if removed!("reconcile.fresh_message_id") => self.event_id.to_string(),
            n => format!("{}.r{n}", self.event_id),
        }
    }
}

/// A row that was never tried is looked for when it is this old: younger ones are on the short way, and have most of a
/// second for it. By the database's clock, which no replica can have wrong.
pub const LOOKED_FOR_AFTER: Duration = Duration::from_secs(2);

/// Which of the waiting rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    /// Those that nobody has tried, from this id on and at least so old.
    Left(Uuid, Duration),
    /// Those that the broker did not take.
    Tried,
}

/// Locks up to `limit` waiting rows, passing over those that another relay holds. Never-tried ones come in the order of
/// their ids, which is about that of their making; others by how often they were tried, so that a few that never go
/// through do not keep the rest from their turn.
pub(crate) async fn lock_pending(
    txn: &DatabaseTransaction,
    which: Which,
    limit: u32,
) -> Result<Vec<Pending>, DbErr> {
    let limit = i64::from(limit).into();
    let query = match which {
        Which::Left(from, age) => sql(
            "SELECT event_id, n, subject, headers, payload FROM outbox
             WHERE published_at IS NULL AND attempts = 0 AND event_id >= $2 AND created_at < now() - make_interval(secs => $3)
             ORDER BY event_id, n LIMIT $1 FOR UPDATE SKIP LOCKED",
            [limit, from.into(), age.as_secs_f64().into()],
        ),
        Which::Tried => sql(
            "SELECT event_id, n, subject, headers, payload FROM outbox WHERE published_at IS NULL AND attempts > 0
             ORDER BY attempts, event_id, n LIMIT $1 FOR UPDATE SKIP LOCKED",
            [limit],
        ),
    };
    Pending::find_by_statement(query).all(txn).await
}

/// Whether anything waits, also what another relay holds.
pub(crate) async fn something_waits(db: &DatabaseConnection) -> Result<bool, DbErr> {
    Ok(db
        .query_one_raw(sql(
            "SELECT 1 FROM outbox WHERE published_at IS NULL LIMIT 1",
            [],
        ))
        .await?
        .is_some())
}

/// Whether the broker has ever taken anything, as far as is remembered.
pub(crate) async fn something_was_published(db: &DatabaseConnection) -> Result<bool, DbErr> {
    Ok(db
        .query_one_raw(sql(
            "SELECT 1 FROM outbox WHERE published_at IS NOT NULL LIMIT 1",
            [],
        ))
        .await?
        .is_some())
}

/// How many rows were published since a time, on `subject` or on any.
pub async fn count_published(
    db: &DatabaseConnection,
    since: OffsetDateTime,
    subject: Option<&str>,
) -> Result<u64, DbErr> {
    let query = sql(
        "SELECT count(*) AS number FROM outbox WHERE published_at >= $1 AND ($2::text IS NULL OR subject = $2)",
        [since.into(), subject.into()],
    );
    let row = db
        .query_one_raw(query)
        .await?
        .ok_or_else(|| DbErr::RecordNotFound("a count".to_owned()))?;
    Ok(row.try_get::<i64>("", "number")?.unsigned_abs())
}

/// Has rows that were published since a time wait again, to be published under the same ids by the next relay. For
/// whoever reads the streams after the broker has lost something; what it still remembers, it does not store twice.
pub async fn publish_again(
    db: &DatabaseConnection,
    since: OffsetDateTime,
    subject: Option<&str>,
) -> Result<u64, DbErr> {
    const ROWS: u64 = 1000;
    let begun = dead_letter::clock(db).await?;
    let mut total = 0;
    loop {
        let update = sql(
            "UPDATE outbox SET published_at = NULL, stream_sequence = NULL WHERE (event_id, n) IN (
                 SELECT event_id, n FROM outbox
                 WHERE published_at >= $1 AND published_at < $2 AND ($3::text IS NULL OR subject = $3)
                 ORDER BY event_id, n LIMIT $4 FOR UPDATE SKIP LOCKED)",
            [since.into(), begun.into(), subject.into(), (ROWS as i64).into()],
        );
        let updated = db.execute_raw(update).await?.rows_affected();
        total += updated;
        if updated < ROWS {
            return Ok(total);
        }
    }
}

/// Refused so often, a row is to blame, and not the broker.
const ATTEMPTS_OF_ITS_OWN: i32 = 5;

/// Whether a row for `subject` has waited longer than `age`: then the broker or the relay is the problem, and more rows
/// do not help. One that the broker has refused again and again is a problem of its own, and holds up nothing.
pub async fn is_behind(
    txn: &DatabaseTransaction,
    subject: &str,
    age: Duration,
) -> Result<bool, DbErr> {
    let found = txn
        .query_one_raw(sql(
            "SELECT 1 FROM outbox WHERE published_at IS NULL AND attempts < $3 AND subject = $2
             AND created_at < now() - make_interval(secs => $1) LIMIT 1",
            [
                age.as_secs_f64().into(),
                subject.into(),
                ATTEMPTS_OF_ITS_OWN.into(),
            ],
        ))
        .await?;
    Ok(found.is_some())
}

/// A row whose PubAck came.
pub(crate) struct Acknowledged {
    pub(crate) event_id: Uuid,
    pub(crate) n: i32,
    pub(crate) stream_sequence: i64,
}

/// Marks exactly these rows. Who has locked them marks in the same transaction; who was handed them marks in one
/// statement, after whoever may have locked them since.
pub(crate) async fn mark_published(
    db: &impl ConnectionTrait,
    rows: &[Acknowledged],
) -> Result<(), DbErr> {
    if rows.is_empty() {
        return Ok(());
    }
    let event_ids: Vec<Uuid> = rows.iter().map(|row| row.event_id).collect();
    let ns: Vec<i32> = rows.iter().map(|row| row.n).collect();
    let sequences: Vec<i64> = rows.iter().map(|row| row.stream_sequence).collect();
    db::execute(
        db,
        sql(
            "UPDATE outbox o SET published_at = clock_timestamp(), stream_sequence = v.stream_sequence, attempts = o.attempts + 1
             FROM unnest($1::uuid[], $2::integer[], $3::bigint[]) AS v (event_id, n, stream_sequence)
             WHERE o.event_id = v.event_id AND o.n = v.n",
            [event_ids.into(), ns.into(), sequences.into()],
        ),
    )
    .await?;
    Ok(())
}

/// Counts an attempt for rows whose PubAck did not come.
pub(crate) async fn count_attempt(
    db: &impl ConnectionTrait,
    rows: &[(Uuid, i32)],
) -> Result<(), DbErr> {
    if rows.is_empty() {
        return Ok(());
    }
    if removed!("relay.puback") {
        let without = |(event_id, n): &(Uuid, i32)| Acknowledged {
            event_id: *event_id,
            n: *n,
            stream_sequence: 0,
        };
        return mark_published(db, &rows.iter().map(without).collect::<Vec<_>>()).await;
    }
    let (event_ids, ns): (Vec<Uuid>, Vec<i32>) = rows.iter().copied().unzip();
    db::execute(
        db,
        sql(
            "UPDATE outbox o SET attempts = o.attempts + 1 FROM unnest($1::uuid[], $2::integer[]) AS v (event_id, n)
             WHERE o.event_id = v.event_id AND o.n = v.n",
            [event_ids.into(), ns.into()],
        ),
    )
    .await?;
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use shared_contracts::{Amount, OrderId, OrderPlaced, UserId};

    use super::*;

    pub(crate) fn pending(n: u32) -> Pending {
        let order_id: OrderId = "01933f3c-7d5a-7b60-9d6f-3f0b4b1f2a11".parse().unwrap();
        let event = OrderPlaced {
            order_id,
            user_id: UserId::parse("alice").unwrap(),
            amount: Amount::new(5).unwrap(),
        };
        let event_id = "01933f3c-7d5a-7b60-9d6f-000000000001".parse().unwrap();
        Message::nth(event_id, n, &event, OffsetDateTime::UNIX_EPOCH, None).into()
    }

    #[test]
    fn a_re_ask_has_a_message_id_of_its_own_and_says_its_number() {
        assert_eq!(
            pending(0).message_id(),
            "01933f3c-7d5a-7b60-9d6f-000000000001"
        );
        assert!(!pending(0).headers.contains(header::ASK));
        assert_eq!(
            pending(3).message_id(),
            "01933f3c-7d5a-7b60-9d6f-000000000001.r3"
        );
        assert!(pending(3).headers.contains(r#""Gozon-Ask":"3""#));
    }
}
