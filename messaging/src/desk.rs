//! The operator's desk of one service: how the flow goes, which messages were not applied, and applying one again.
//!
//! A replay here needs no broker: the stored message goes through the consumer's own handler, in one transaction with its
//! inbox row and the note that it was done. What was applied meanwhile is recognised, as after any repetition. A dry run is
//! the same transaction, rolled back, so it cannot foresee anything other than what would happen.

use std::ops::ControlFlow;

use sea_orm::entity::prelude::*;
use sea_orm::{
    ConnectionTrait, DatabaseConnection, DatabaseTransaction, DbErr, FromQueryResult, QueryOrder,
    QuerySelect, RuntimeErr, TransactionTrait,
};
use serde::Serialize;
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use shared_contracts::Event;

use crate::broker::Broker;
use crate::consumer::{Handled, Received, is_transient, read};
use crate::db::{self, Failure, Retry, sql};
use crate::dead_letter;
use crate::inbox::{self, Delivery};
use crate::topology::Subscription;

/// Counting goes no further: who has this many waiting needs no exact number.
const COUNT_MAX: i64 = 100_000;

/// How the flow of one service goes.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = Flow)]
pub struct Flow {
    /// Rows of the outbox that are not published yet; counts to 100000.
    pub outbox_pending: i64,
    /// How long the oldest of them has waited.
    pub outbox_oldest_seconds: f64,
    /// Messages that could not be handled and wait for a person.
    pub poison: i64,
    /// Messages that contradict what is decided and wait for a person.
    pub quarantine: i64,
    /// The consumer as the broker sees it; null while the broker is away.
    #[schema(required = true)]
    pub consumer: Option<Lag>,
}

/// What a consumer has not done yet.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = ConsumerLag)]
pub struct Lag {
    /// Its name.
    pub name: String,
    /// Messages that were not delivered yet.
    pub pending: u64,
    /// Messages that were delivered and not acknowledged yet.
    pub ack_pending: u64,
    /// Of these, those that were delivered more than once.
    pub redelivered: u64,
}

#[derive(FromQueryResult)]
struct FlowRow {
    outbox_pending: i64,
    outbox_oldest_seconds: f64,
    poison: i64,
    quarantine: i64,
}

/// Looks.
pub async fn flow(
    db: &DatabaseConnection,
    broker: &Broker,
    subscription: &Subscription,
) -> Result<Flow, DbErr> {
    let row = FlowRow::find_by_statement(sql(
        "SELECT count(*) AS outbox_pending,
                coalesce(extract(epoch FROM clock_timestamp() - min(created_at)), 0)::float8 AS outbox_oldest_seconds,
                (SELECT count(*) FROM dead_letters WHERE kind = 'poison' AND (replayed_at IS NULL OR last_seen_at > replayed_at)) AS poison,
                (SELECT count(*) FROM dead_letters WHERE kind = 'quarantine' AND (replayed_at IS NULL OR last_seen_at > replayed_at)) AS quarantine
         FROM (SELECT created_at FROM outbox WHERE published_at IS NULL ORDER BY event_id, n LIMIT $1) AS waiting",
        [COUNT_MAX.into()],
    ))
    .one(db)
    .await?
    .ok_or_else(|| DbErr::RecordNotFound("a count".to_owned()))?;
    let FlowRow {
        outbox_pending,
        outbox_oldest_seconds,
        poison,
        quarantine,
    } = row;
    Ok(Flow {
        outbox_pending,
        outbox_oldest_seconds,
        poison,
        quarantine,
        consumer: lag(broker, subscription).await,
    })
}

pub(crate) async fn lag(broker: &Broker, subscription: &Subscription) -> Option<Lag> {
    if !broker.is_connected() {
        return None;
    }
    let jetstream = broker.jetstream();
    let consumer: async_nats::jetstream::consumer::PullConsumer = jetstream
        .get_consumer_from_stream(subscription.consumer, subscription.stream)
        .await
        .ok()?;
    let info = consumer.cached_info();
    Some(Lag {
        name: subscription.consumer.to_owned(),
        pending: info.num_pending,
        ack_pending: info.num_ack_pending as u64,
        redelivered: info.num_redelivered as u64,
    })
}

/// A message that was not applied.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = DeadLetter)]
pub struct DeadLetter {
    id: Uuid,
    /// Who could not take it.
    consumer: String,
    /// `poison`: it could not be handled. `quarantine`: it contradicts what is decided.
    kind: String,
    /// Why, in words.
    cause: String,
    /// Whether it waits for a person: never applied again, or back since.
    waits: bool,
    #[schema(required = true)]
    event_id: Option<Uuid>,
    #[schema(required = true)]
    order_id: Option<Uuid>,
    subject: String,
    stream: String,
    stream_sequence: i64,
    /// Which delivery of the message it was.
    delivered: i32,
    /// The headers as received, `Name: value` lines.
    headers: String,
    /// The body as received.
    payload: String,
    /// How often it came.
    times: i32,
    #[serde(with = "time::serde::rfc3339")]
    #[schema(value_type = String, format = DateTime)]
    created_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    #[schema(value_type = String, format = DateTime)]
    last_seen_at: OffsetDateTime,
    /// How often it was applied again.
    replays: i32,
    #[serde(with = "time::serde::rfc3339::option")]
    #[schema(required = true, value_type = Option<String>, format = DateTime)]
    replayed_at: Option<OffsetDateTime>,
}

impl DeadLetter {
    /// Its id, which is also its place in lists.
    pub fn id(&self) -> Uuid {
        self.id
    }
}

impl From<dead_letter::Model> for DeadLetter {
    fn from(row: dead_letter::Model) -> Self {
        Self {
            id: row.id,
            waits: row.waits(),
            consumer: row.consumer,
            kind: row.kind,
            cause: row.cause,
            event_id: row.event_id,
            order_id: row.order_id,
            subject: row.subject,
            stream: row.stream,
            stream_sequence: row.stream_sequence,
            delivered: row.delivered,
            headers: String::from_utf8_lossy(&row.headers).into_owned(),
            payload: String::from_utf8_lossy(&row.payload).into_owned(),
            times: row.times,
            created_at: row.created_at,
            last_seen_at: row.last_seen_at,
            replays: row.replays,
            replayed_at: row.replayed_at,
        }
    }
}

/// A page of dead letters.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = DeadLetterList)]
pub struct DeadLetters {
    /// Newest first.
    pub items: Vec<DeadLetter>,
    /// Ask with it for the next page; null on the last one.
    #[schema(required = true)]
    pub next_cursor: Option<String>,
}

/// Up to `limit` dead letters older than `before`, newest first.
pub async fn dead_letters(
    db: &DatabaseConnection,
    before: Option<Uuid>,
    limit: u64,
) -> Result<DeadLetters, DbErr> {
    let mut query = dead_letter::Entity::find()
        .order_by_desc(dead_letter::Column::Id)
        .limit(limit + 1);
    if let Some(before) = before {
        query = query.filter(dead_letter::Column::Id.lt(before));
    }
    let mut items: Vec<DeadLetter> = query
        .all(db)
        .await?
        .into_iter()
        .map(DeadLetter::from)
        .collect();
    let more = items.len() as u64 > limit;
    items.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
    let next_cursor = items
        .last()
        .filter(|_| more)
        .map(|last| last.id.simple().to_string());
    Ok(DeadLetters { items, next_cursor })
}

/// What applying a dead letter again did, or would do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = Replay)]
pub struct Replay {
    /// Which dead letter.
    pub id: Uuid,
    /// Whether all was rolled back.
    pub dry_run: bool,
    /// `applied`, `nothing_to_do` (it was applied meanwhile), `poison` or `quarantine` (it is refused as before).
    #[schema(value_type = String)]
    pub outcome: &'static str,
    /// What happened, in words.
    pub detail: String,
}

/// Applies a dead letter again through the handler of its consumer. `None`: there is no such dead letter. The effect is
/// given for what is to be done after a commit. `describe` says what an effect did, if it did anything.
pub async fn replay<E: Event, T>(
    db: &DatabaseConnection,
    subscription: &Subscription,
    id: Uuid,
    dry_run: bool,
    handle: impl AsyncFn(&DatabaseTransaction, &[Received<E>]) -> anyhow::Result<Handled<T>>,
    describe: impl Fn(&T) -> Option<String>,
) -> Result<Option<(Replay, Option<T>)>, Failure> {
    // After a commit whose answer was lost, the next try finds that there is nothing left to do.
    let mut retry = Retry::begin();
    loop {
        let tried = replay_once(db, subscription, id, dry_run, &handle, &describe);
        if let ControlFlow::Break(settled) = retry.settle(tried).await {
            return settled;
        }
    }
}

async fn replay_once<E: Event, T>(
    db: &DatabaseConnection,
    subscription: &Subscription,
    id: Uuid,
    dry_run: bool,
    handle: &impl AsyncFn(&DatabaseTransaction, &[Received<E>]) -> anyhow::Result<Handled<T>>,
    describe: &impl Fn(&T) -> Option<String>,
) -> Result<Option<(Replay, Option<T>)>, Failure> {
    // Not locked: the consumer takes this row last, and whoever is second finds what the first has done.
    let Some(letter) = dead_letter::Entity::find_by_id(id).one(db).await? else {
        return Ok(None);
    };
    let (headers, payload) = letter.message();
    let refused = async |outcome: &'static str, cause: String| {
        if !dry_run {
            note_return(db, &letter, outcome, &cause).await?;
        }
        Ok::<_, Failure>(Some((
            Replay {
                id,
                dry_run,
                outcome,
                detail: cause,
            },
            None,
        )))
    };
    let received = match read::<E>(Some(&headers), &payload) {
        Ok(received) => received,
        Err(cause) => return refused("poison", cause).await,
    };
    let txn = db.begin().await?;
    let delivery = Delivery {
        event_id: received.event_id.as_uuid(),
        stream_sequence: letter.stream_sequence,
        delivered: letter.delivered,
    };
    let first = inbox::record(&txn, subscription.consumer, &[delivery]).await?;
    let received = Received {
        first: !first.is_empty(),
        ..received
    };
    let handled = match handle(&txn, &[received]).await {
        Ok(handled) => handled,
        Err(error) if is_transient(&error) => return Err(later(&error).into()),
        Err(error) => {
            txn.rollback().await?;
            return refused("poison", format!("{error:#}")).await;
        }
    };
    let Handled {
        mut quarantined,
        effect,
    } = handled;
    if let Some(contradiction) = quarantined.pop() {
        txn.rollback().await?;
        return refused("quarantine", contradiction.cause).await;
    }
    let (outcome, detail) = match describe(&effect) {
        Some(detail) => ("applied", detail),
        None => ("nothing_to_do", "It was applied meanwhile.".to_owned()),
    };
    let replay = Replay {
        id,
        dry_run,
        outcome,
        detail,
    };
    if dry_run {
        txn.rollback().await?;
        return Ok(Some((replay, None)));
    }
    let note = "UPDATE dead_letters SET replays = replays + 1, replayed_at = clock_timestamp() WHERE id = $1";
    txn.execute_raw(sql(note, [id.into()])).await?;
    db::commit(txn).await?;
    Ok(Some((replay, Some(effect))))
}

/// A race that was lost is no database error, and ends in the same way: the next try sees what was in the way.
fn later(error: &anyhow::Error) -> DbErr {
    let cause = error
        .chain()
        .find_map(|cause| cause.downcast_ref::<DbErr>())
        .cloned();
    cause.unwrap_or_else(|| DbErr::Conn(RuntimeErr::Internal(format!("{error:#}"))))
}

/// It was tried and is back: it goes on waiting. Counted from what was read, so that doing it again counts once.
async fn note_return(
    db: &DatabaseConnection,
    letter: &dead_letter::Model,
    kind: &str,
    cause: &str,
) -> Result<(), DbErr> {
    db.execute_raw(sql(
        "UPDATE dead_letters SET replays = $4 + 1, replayed_at = now(), times = $5 + 1, kind = $2, cause = $3,
                                 last_seen_at = clock_timestamp() WHERE id = $1",
        [letter.id.into(), kind.into(), dead_letter::short(cause).into(), letter.replays.into(), letter.times.into()],
    ))
    .await?;
    Ok(())
}
