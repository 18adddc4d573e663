//! The table of pending and published events.

use std::time::Duration;

use failpoint::removed;
use sea_orm::entity::prelude::*;
use sea_orm::sea_query::Values;
use sea_orm::{DbBackend, DbErr, FromQueryResult, Statement, Value};
use tokio::time::Instant;
use tracing::error;
use uuid::Uuid;

use crate::inbox::table::Arrivals;
use crate::outbox::message::{Headers, Message};
use crate::postgres::{execute, sql};
use crate::scan::{RECENT, id_at};

#[sea_orm::model]
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "outbox")]
pub(crate) struct Model {
    #[sea_orm(primary_key, auto_increment = false)]
    pub event_id: Uuid,
    /// 0 for the first publication, then 1, 2, ... for each re-ask.
    #[sea_orm(primary_key, auto_increment = false)]
    pub n: i32,
    pub subject: String,
    /// The headers: a JSON object of strings.
    pub headers: String,
    /// The body: JSON.
    pub payload: String,
    pub attempts: i32,
    pub created_at: TimeDateTimeWithTimeZone,
    /// When the PubAck was recorded; `None` while the row is pending.
    pub published_at: Option<TimeDateTimeWithTimeZone>,
    /// Sequence of the message in the stream, from the newest PubAck.
    pub stream_sequence: Option<i64>,
}

impl ActiveModelBehavior for ActiveModel {}

/// A row to publish.
#[derive(Clone, Debug)]
pub(crate) struct Pending {
    pub(crate) event_id: Uuid,
    pub(crate) n: i32,
    pub(crate) subject: String,
    pub(crate) headers: Headers,
    pub(crate) payload: String,
    /// Whether the relay publishes it at once.
    pub(crate) is_urgent: bool,
}

/// The columns of a [`Pending`] row.
#[derive(FromQueryResult)]
struct PendingRow {
    event_id: Uuid,
    n: i32,
    subject: String,
    headers: String,
    payload: String,
}

impl From<PendingRow> for Pending {
    fn from(row: PendingRow) -> Self {
        // Services store only valid headers, so someone edited the table. The reader will make the message
        // a dead letter.
        let headers = Headers::from_json(&row.headers).unwrap_or_else(|error| {
            error!(event.id = %row.event_id, error = %error, "Outbox row whose headers are not a JSON object of strings");
            Headers::default()
        });
        Self {
            event_id: row.event_id,
            n: row.n,
            subject: row.subject,
            headers,
            payload: row.payload,
            is_urgent: true,
        }
    }
}

impl From<Message> for Pending {
    fn from(message: Message) -> Self {
        let Message {
            event_id,
            n,
            subject,
            headers,
            payload,
            is_urgent,
        } = message;
        Self {
            event_id: event_id.as_uuid(),
            n,
            subject,
            headers,
            payload,
            is_urgent,
        }
    }
}

impl Pending {
    /// The `Nats-Msg-Id`. The broker drops a repeated id, so a re-ask has a different one.
    pub(crate) fn message_id(&self) -> String {
        match self.n {
            0 => self.event_id.to_string(),
            _ if removed!("reconcile.fresh_message_id") => self.event_id.to_string(),
            n => format!("{}.r{n}", self.event_id),
        }
    }
}

/// Inserts rows.
pub(crate) async fn insert(
    txn: &impl ConnectionTrait,
    messages: Vec<Message>,
) -> Result<Vec<Pending>, DbErr> {
    if messages.is_empty() {
        return Ok(Vec::new());
    }
    let (columns, rows) = columns(messages);
    // The statement text is the same for any number of rows, so it is prepared once per connection.
    let insert = sql(
        "INSERT INTO outbox (event_id, n, subject, headers, payload)
         SELECT * FROM unnest($1::uuid[], $2::integer[], $3::text[], $4::text[], $5::text[])",
        columns,
    );
    execute(txn, insert).await?;
    Ok(rows)
}

/// Extends a change by the insert of the messages whose event ids it returns, and by the insert of
/// inbox rows. `change` is described at
/// [`Transaction::change_and_enqueue`](crate::Transaction::change_and_enqueue).
///
/// With inbox rows, each returned row has a column `recorded`, the number of new ones. If nothing
/// was changed, one row without an event id has it.
pub(crate) fn with_insert(
    change: Statement,
    messages: Vec<Message>,
    arrivals: Option<&Arrivals>,
) -> (Statement, Vec<Pending>) {
    let mut values = change.values.unwrap_or(Values(Vec::new())).0;
    let mut text = format!("WITH {}", change.sql);
    let (columns, rows) = columns(messages);
    if !rows.is_empty() {
        let first = values.len() + 1;
        let [n, subject, headers, payload] = [first + 1, first + 2, first + 3, first + 4];
        text += &format!(
            ",
             enqueued AS (
                 INSERT INTO outbox (event_id, n, subject, headers, payload)
                 SELECT v.* FROM unnest(${first}::uuid[], ${n}::integer[], ${subject}::text[],
                                        ${headers}::text[], ${payload}::text[])
                     AS v (event_id, n, subject, headers, payload)
                 WHERE v.event_id IN (SELECT event_id FROM changed))"
        );
        values.extend(columns);
    }
    match arrivals {
        None => text += " SELECT * FROM changed",
        Some(arrivals) => {
            let (insert, columns) = arrivals.insert(values.len() + 1);
            text += &format!(
                ",
                 recorded AS ({insert} RETURNING 1)
                 SELECT * FROM (SELECT count(*) AS recorded FROM recorded) AS inbox
                 LEFT JOIN changed ON true"
            );
            values.extend(columns);
        }
    }
    let statement = Statement::from_sql_and_values(DbBackend::Postgres, text, values);
    (statement, rows)
}

/// The columns of new rows, each as one array, and the rows.
fn columns(mut messages: Vec<Message>) -> ([Value; 5], Vec<Pending>) {
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
        headers.push(message.headers.to_json());
        payloads.push(message.payload.clone());
    }
    let columns = [
        event_ids.into(),
        ns.into(),
        subjects.into(),
        headers.into(),
        payloads.into(),
    ];
    (columns, messages.into_iter().map(Pending::from).collect())
}

/// Minimum age at which untried rows are polled: younger rows were handed off, and the hand-off
/// gets most of a second. Measured by the database's clock, which is the same for all replicas.
pub(crate) const POLLED_AFTER: Duration = Duration::from_secs(2);

/// Which pending rows to lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    /// Untried rows whose id is younger than [`RECENT`].
    Recent,
    /// Untried rows from this id on, with at least this age.
    Untried(Uuid, Duration),
    /// Rows that the broker did not accept.
    Tried,
}

/// Locks up to `limit` pending rows and skips those that another relay has locked. Untried rows are
/// sorted by id, which is roughly their order of creation. Other rows are sorted by attempts, so
/// that rows that always fail do not block the rest.
pub(crate) async fn lock_pending(
    txn: &impl ConnectionTrait,
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
    let rows = PendingRow::find_by_statement(query).all(txn).await?;
    Ok(rows.into_iter().map(Pending::from).collect())
}

/// Whether the outbox or retention shows that the broker ever stored a message.
pub(crate) async fn has_published(db: &impl ConnectionTrait) -> Result<bool, DbErr> {
    exists(
        db,
        "SELECT 1 FROM outbox WHERE published_at IS NOT NULL LIMIT 1",
    )
    .await
}

async fn exists(db: &impl ConnectionTrait, query: &str) -> Result<bool, DbErr> {
    Ok(db.query_one_raw(sql(query, [])).await?.is_some())
}

/// After this many attempts, the cause is the row and not the broker.
const ATTEMPTS_OF_ITS_OWN: i32 = 5;

/// Whether a row for `subject` has been pending for longer than `age`. Then the broker or the relay
/// is the bottleneck, and more rows do not help. A row that the broker refuses every time does not
/// count.
///
/// Checks only rows that have recently reached that age. If there are none, for example after a
/// quiet hour, a few requests too many are published, which is harmless.
pub(crate) async fn is_behind(
    txn: &impl ConnectionTrait,
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

/// A row with its PubAck.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Acknowledged {
    pub(crate) event_id: Uuid,
    pub(crate) n: i32,
    pub(crate) stream_sequence: i64,
    /// When the PubAck arrived, and on which connection.
    pub(crate) at: Instant,
    pub(crate) connection_number: u64,
}

/// Marks exactly these rows. Polled rows are marked in the transaction that locked them. Handed-off
/// rows are marked in one statement, which waits if another transaction has locked them since.
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
    let ages: Vec<f64> = rows
        .iter()
        .map(|row| row.at.elapsed().as_secs_f64())
        .collect();
    let update = sql(
        "UPDATE outbox o SET published_at = statement_timestamp() - make_interval(secs => v.age),
                             stream_sequence = v.stream_sequence,
                             attempts = o.attempts + 1
         FROM unnest($1::uuid[], $2::integer[], $3::bigint[], $4::float8[])
              AS v (event_id, n, stream_sequence, age)
         WHERE o.event_id = v.event_id AND o.n = v.n",
        [event_ids.into(), ns.into(), sequences.into(), ages.into()],
    );
    execute(db, update).await?;
    Ok(())
}

/// Makes marked rows pending again.
pub(crate) async fn unmark(db: &impl ConnectionTrait, rows: &[Acknowledged]) -> Result<(), DbErr> {
    let event_ids: Vec<Uuid> = rows.iter().map(|row| row.event_id).collect();
    let ns: Vec<i32> = rows.iter().map(|row| row.n).collect();
    let update = sql(
        "UPDATE outbox o SET published_at = NULL, stream_sequence = NULL
         FROM unnest($1::uuid[], $2::integer[]) AS v (event_id, n)
         WHERE o.event_id = v.event_id AND o.n = v.n",
        [event_ids.into(), ns.into()],
    );
    execute(db, update).await?;
    Ok(())
}

/// Counts a publish attempt for rows without a PubAck.
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
            at: Instant::now(),
            connection_number: 0,
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
