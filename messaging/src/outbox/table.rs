//! The table of events that wait to be published, and of those that were.

use std::time::Duration;

use failpoint::removed;
use sea_orm::entity::prelude::*;
use sea_orm::{DatabaseConnection, DatabaseTransaction, DbErr, FromQueryResult};
use uuid::Uuid;

use crate::outbox::message::Message;
use crate::postgres::{execute, sql};
use crate::scan::{RECENT, id_at};

#[sea_orm::model]
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "outbox")]
pub(crate) struct Model {
    #[sea_orm(primary_key, auto_increment = false)]
    pub event_id: Uuid,
    /// 0 when it is published for the first time, then 1, 2, ... for each time on purpose.
    #[sea_orm(primary_key, auto_increment = false)]
    pub n: i32,
    pub subject: String,
    /// A JSON object of strings.
    pub headers: String,
    /// JSON.
    pub payload: String,
    pub attempts: i32,
    pub created_at: TimeDateTimeWithTimeZone,
    /// When the PubAck was recorded; none while the row waits.
    pub published_at: Option<TimeDateTimeWithTimeZone>,
    /// Where the broker stored it, by the newest PubAck.
    pub stream_sequence: Option<i64>,
}

impl ActiveModelBehavior for ActiveModel {}

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
    /// The broker drops a repeated id, so what is published again on purpose gets another one.
    pub(crate) fn message_id(&self) -> String {
        match self.n {
            0 => self.event_id.to_string(),
            _ if removed!("reconcile.fresh_message_id") => self.event_id.to_string(),
            n => format!("{}.r{n}", self.event_id),
        }
    }
}

/// Inserts rows. [`Transaction::enqueue`](crate::Transaction::enqueue) is the only caller.
pub(crate) async fn insert(
    txn: &DatabaseTransaction,
    mut messages: Vec<Message>,
) -> Result<Vec<Pending>, DbErr> {
    if messages.is_empty() {
        return Ok(Vec::new());
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
    let insert = sql(
        "INSERT INTO outbox (event_id, n, subject, headers, payload)
         SELECT * FROM unnest($1::uuid[], $2::integer[], $3::text[], $4::text[], $5::text[])",
        [
            event_ids.into(),
            ns.into(),
            subjects.into(),
            headers.into(),
            payloads.into(),
        ],
    );
    execute(txn, insert).await?;
    Ok(messages.into_iter().map(Pending::from).collect())
}

/// A row that was never tried is polled for when it is this old: younger ones were handed off, and
/// get most of a second for that. By the database's clock, which no replica can have wrong.
pub(crate) const POLLED_AFTER: Duration = Duration::from_secs(2);

/// Which of the pending rows to take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    /// Those that nobody has tried, with an id of the last [`RECENT`] seconds.
    Recent,
    /// Those that nobody has tried, from this id on and at least this old.
    Untried(Uuid, Duration),
    /// Those that the broker did not take.
    Tried,
}

/// Locks up to `limit` pending rows, skipping those that another relay holds. Untried rows come in
/// the order of their ids, which is about the order of their creation; the others by the number of
/// attempts, so that a few that always fail do not keep the rest from their turn.
pub(crate) async fn lock_pending(
    txn: &DatabaseTransaction,
    which: Which,
    limit: u32,
) -> Result<Vec<Pending>, DbErr> {
    let limit = i64::from(limit).into();
    let query = match which {
        Which::Recent => {
            let oldest = id_at("now() - make_interval(secs => $3)");
            let query = format!(
                "SELECT event_id, n, subject, headers, payload FROM outbox
                 WHERE published_at IS NULL AND attempts = 0 AND event_id >= {oldest}
                   AND created_at < now() - make_interval(secs => $2)
                 ORDER BY event_id, n LIMIT $1 FOR UPDATE SKIP LOCKED"
            );
            let (age, recent) = (POLLED_AFTER.as_secs_f64(), RECENT.as_secs_f64());
            sql(&query, [limit, age.into(), recent.into()])
        }
        Which::Untried(from, age) => sql(
            "SELECT event_id, n, subject, headers, payload FROM outbox
             WHERE published_at IS NULL AND attempts = 0 AND event_id >= $2
               AND created_at < now() - make_interval(secs => $3)
             ORDER BY event_id, n LIMIT $1 FOR UPDATE SKIP LOCKED",
            [limit, from.into(), age.as_secs_f64().into()],
        ),
        Which::Tried => sql(
            "SELECT event_id, n, subject, headers, payload FROM outbox
             WHERE published_at IS NULL AND attempts > 0
             ORDER BY attempts, event_id, n LIMIT $1 FOR UPDATE SKIP LOCKED",
            [limit],
        ),
    };
    Pending::find_by_statement(query).all(txn).await
}

/// Whether the broker has ever taken anything, as far as retention has left traces of it.
pub(crate) async fn has_published(db: &DatabaseConnection) -> Result<bool, DbErr> {
    exists(
        db,
        "SELECT 1 FROM outbox WHERE published_at IS NOT NULL LIMIT 1",
    )
    .await
}

async fn exists(db: &DatabaseConnection, query: &str) -> Result<bool, DbErr> {
    Ok(db.query_one_raw(sql(query, [])).await?.is_some())
}

/// Refused this often, the row is to blame and not the broker.
const ATTEMPTS_OF_ITS_OWN: i32 = 5;

/// Whether a row for `subject` has waited longer than `age`: then the broker or the relay is the
/// problem, and more rows do not help. A row that the broker refuses every time does not count.
///
/// Looks only at rows that have just become so old. Without any, as after a quiet hour, a few
/// requests too many are published, which does no harm.
pub(crate) async fn is_behind(
    txn: &DatabaseTransaction,
    subject: &str,
    age: Duration,
) -> Result<bool, DbErr> {
    let oldest = id_at("now() - make_interval(secs => $1 + $4)");
    let query = format!(
        "SELECT 1 FROM outbox WHERE published_at IS NULL AND attempts < $3 AND subject = $2
           AND event_id >= {oldest} AND event_id < {newest}
           AND created_at < now() - make_interval(secs => $1) LIMIT 1",
        newest = id_at("now() - make_interval(secs => $1)"),
    );
    let query = sql(
        &query,
        [
            age.as_secs_f64().into(),
            subject.into(),
            ATTEMPTS_OF_ITS_OWN.into(),
            RECENT.as_secs_f64().into(),
        ],
    );
    Ok(txn.query_one_raw(query).await?.is_some())
}

/// A row whose PubAck came.
pub(crate) struct Acknowledged {
    pub(crate) event_id: Uuid,
    pub(crate) n: i32,
    pub(crate) stream_sequence: i64,
}

/// Marks exactly these rows. A relay that has locked them marks in the same transaction; one that
/// was handed them marks in one statement, which waits for whoever may have locked them since.
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
    let update = sql(
        "UPDATE outbox o SET published_at = clock_timestamp(),
                             stream_sequence = v.stream_sequence,
                             attempts = o.attempts + 1
         FROM unnest($1::uuid[], $2::integer[], $3::bigint[]) AS v (event_id, n, stream_sequence)
         WHERE o.event_id = v.event_id AND o.n = v.n",
        [event_ids.into(), ns.into(), sequences.into()],
    );
    execute(db, update).await?;
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
        let as_if_acknowledged = |(event_id, n): &(Uuid, i32)| Acknowledged {
            event_id: *event_id,
            n: *n,
            stream_sequence: 0,
        };
        let rows: Vec<Acknowledged> = rows.iter().map(as_if_acknowledged).collect();
        return mark_published(db, &rows).await;
    }
    let (event_ids, ns): (Vec<Uuid>, Vec<i32>) = rows.iter().copied().unzip();
    let update = sql(
        "UPDATE outbox o SET attempts = o.attempts + 1
         FROM unnest($1::uuid[], $2::integer[]) AS v (event_id, n)
         WHERE o.event_id = v.event_id AND o.n = v.n",
        [event_ids.into(), ns.into()],
    );
    execute(db, update).await?;
    Ok(())
}
