//! The backlog of a service. The operator's page, the gauges and `gozon outbox` use the same
//! queries.

use std::sync::{Arc, PoisonError, RwLock};

use anyhow::Context as _;
use async_nats::jetstream::consumer::{self, PullConsumer};
use broker::Broker;
use futures_util::TryStreamExt as _;
use metrics::{describe_gauge, gauge};
use sea_orm::{ConnectionTrait, DbErr, FromQueryResult};
use serde::Serialize;
use utoipa::ToSchema;

use crate::database::Database;
use crate::postgres::{one_row, sql};

/// Counting stops here, because it is expensive and nobody needs an exact larger number.
const COUNT_MAX: i64 = 100_000;

const OUTBOX_PENDING: &str = "gozon_outbox_pending";
const OUTBOX_OLDEST: &str = "gozon_outbox_oldest_pending_age_seconds";
const DEAD_LETTERS: &str = "gozon_dead_letters";
const DEFERRED: &str = "gozon_deferred_messages";
const DEFERRED_OLDEST: &str = "gozon_oldest_deferred_message_age_seconds";
const CONSUMER_PENDING: &str = "gozon_consumer_pending";
const CONSUMER_UNACKNOWLEDGED: &str = "gozon_consumer_unacknowledged";
const STREAM_MESSAGES: &str = "gozon_stream_messages";
const STREAM_BYTES: &str = "gozon_stream_bytes";
const STREAM_MAX_BYTES: &str = "gozon_stream_max_bytes";

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Backlog {
    #[serde(flatten)]
    pub outbox: OutboxBacklog,
    #[serde(flatten)]
    pub messages: MessageBacklog,
}

/// Pending outbox rows.
#[derive(Clone, Debug, Default, FromQueryResult, Serialize, ToSchema)]
pub struct OutboxBacklog {
    /// Outbox rows that are not published yet, counted up to 100,000.
    pub outbox_pending: i64,
    /// Age of the oldest unpublished row.
    pub outbox_oldest_seconds: f64,
    /// Largest number of publish attempts of an unpublished row.
    pub outbox_attempts_max: i32,
}

/// Received messages that are not applied.
#[derive(Clone, Debug, FromQueryResult, Serialize, ToSchema)]
pub struct MessageBacklog {
    /// Unresolved dead letters that cannot be handled.
    pub poison: i64,
    /// Unresolved dead letters that contradict an earlier decision.
    pub quarantine: i64,
    /// Deferred messages: their row is locked, or the database refuses it for now. They are applied
    /// automatically once the row is free. Counted up to 100,000.
    pub deferred: i64,
    /// Time since the oldest deferred message was deferred.
    pub deferred_oldest_seconds: f64,
}

impl Backlog {
    pub async fn read(db: &impl ConnectionTrait) -> Result<Self, DbErr> {
        Ok(Self {
            outbox: OutboxBacklog::read(db).await?,
            messages: MessageBacklog::read(db).await?,
        })
    }
}

impl OutboxBacklog {
    /// A scan: it is slow while an old snapshot keeps published rows in the index.
    pub(crate) async fn read(db: &impl ConnectionTrait) -> Result<Self, DbErr> {
        let query = "
        SELECT count(*) AS outbox_pending,
               coalesce(extract(epoch FROM clock_timestamp() - min(created_at)), 0)::float8
                   AS outbox_oldest_seconds,
               coalesce(max(attempts), 0) AS outbox_attempts_max
        FROM (SELECT created_at, attempts FROM outbox
              WHERE published_at IS NULL ORDER BY event_id, n LIMIT $1) AS pending";
        one_row(db, sql(query, [COUNT_MAX.into()])).await
    }
}

impl MessageBacklog {
    pub(crate) async fn read(db: &impl ConnectionTrait) -> Result<Self, DbErr> {
        let query = "
        SELECT letters.poison, letters.quarantine, waiting.deferred,
               waiting.deferred_oldest_seconds
        FROM (SELECT count(*) FILTER (WHERE kind = 'poison') AS poison,
                     count(*) FILTER (WHERE kind = 'quarantine') AS quarantine
              FROM dead_letters
              WHERE replayed_at IS NULL OR last_seen_at > replayed_at) AS letters,
             (SELECT count(*) AS deferred,
                     coalesce(extract(epoch FROM clock_timestamp() - min(deferred_at)), 0)::float8
                         AS deferred_oldest_seconds
              FROM (SELECT deferred_at FROM deferred LIMIT $1) AS rows) AS waiting";
        one_row(db, sql(query, [COUNT_MAX.into()])).await
    }
}

/// The outbox backlog from the relay's last scan in this process; `None` if it failed. Clones share
/// the value.
#[derive(Clone, Debug, Default)]
pub(crate) struct OutboxBacklogWatch(Arc<RwLock<Option<OutboxBacklog>>>);

impl OutboxBacklogWatch {
    pub(crate) fn set(&self, found: Option<OutboxBacklog>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = found;
    }

    pub(crate) fn get(&self) -> Option<OutboxBacklog> {
        self.0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// The lag of a consumer, as the broker reports it.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ConsumerLag {
    pub name: String,
    /// Messages that are not delivered yet.
    pub pending: u64,
    /// Messages that are delivered but not acknowledged yet.
    pub ack_pending: u64,
    /// Unacknowledged messages that were delivered more than once.
    pub redelivered: u64,
}

/// `None` if the broker does not answer or the consumer does not exist.
pub(crate) async fn consumer_lag(
    broker: &Broker,
    consumer: &str,
    stream: &str,
) -> Option<ConsumerLag> {
    if !broker.is_connected() {
        return None;
    }
    let found: Result<PullConsumer, _> = broker
        .jetstream()
        .get_consumer_from_stream(consumer, stream)
        .await;
    let found = found.ok()?;
    let info = found.cached_info();
    Some(ConsumerLag {
        name: consumer.to_owned(),
        pending: info.num_pending,
        ack_pending: info.num_ack_pending as u64,
        redelivered: info.num_redelivered as u64,
    })
}

pub(crate) fn describe_gauges() {
    describe_gauge!(
        OUTBOX_PENDING,
        "Unpublished outbox rows, counted up to 100,000"
    );
    describe_gauge!(OUTBOX_OLDEST, "Age of the oldest unpublished outbox row");
    describe_gauge!(DEAD_LETTERS, "Unresolved dead letters");
    describe_gauge!(
        DEFERRED,
        "Deferred messages: their row is locked, or the database refuses it for now"
    );
    describe_gauge!(
        DEFERRED_OLDEST,
        "Time since the oldest deferred message was deferred"
    );
    describe_gauge!(
        CONSUMER_PENDING,
        "Messages that are not delivered to the consumer yet"
    );
    describe_gauge!(
        CONSUMER_UNACKNOWLEDGED,
        "Messages that are delivered but not acknowledged yet"
    );
    describe_gauge!(STREAM_MESSAGES, "Messages in the stream");
    describe_gauge!(STREAM_BYTES, "Size of the stream");
    describe_gauge!(
        STREAM_MAX_BYTES,
        "Size limit, beyond which the stream deletes its oldest messages"
    );
}

pub(crate) async fn set_gauges(db: &Database, outbox: &OutboxBacklogWatch) -> Result<(), DbErr> {
    let found = MessageBacklog::read(db).await?;
    // The last scan may be old if the database does not answer, so query the database first.
    if let Some(outbox) = outbox.get() {
        gauge!(OUTBOX_PENDING).set(outbox.outbox_pending as f64);
        gauge!(OUTBOX_OLDEST).set(outbox.outbox_oldest_seconds);
    }
    gauge!(DEAD_LETTERS, "kind" => "poison").set(found.poison as f64);
    gauge!(DEAD_LETTERS, "kind" => "quarantine").set(found.quarantine as f64);
    gauge!(DEFERRED).set(found.deferred as f64);
    gauge!(DEFERRED_OLDEST).set(found.deferred_oldest_seconds);
    Ok(())
}

/// Sets the gauges of a stream's size and of the lag of its durable consumers. The consumers belong
/// to other services, which may be down.
pub(crate) async fn set_stream_gauges(broker: &Broker, stream: &'static str) -> anyhow::Result<()> {
    anyhow::ensure!(broker.is_connected(), "the broker is away");
    let found = broker.jetstream().get_stream(stream).await?;
    let info = found.cached_info();
    gauge!(STREAM_MESSAGES, "stream" => stream).set(info.state.messages as f64);
    gauge!(STREAM_BYTES, "stream" => stream).set(info.state.bytes as f64);
    gauge!(STREAM_MAX_BYTES, "stream" => stream).set(info.config.max_bytes as f64);
    let readers: Vec<consumer::Info> = found
        .consumers()
        .try_collect()
        .await
        .context("consumers cannot be listed")?;
    for reader in readers {
        let Some(name) = reader.config.durable_name else {
            continue;
        };
        gauge!(CONSUMER_PENDING, "consumer" => name.clone()).set(reader.num_pending as f64);
        gauge!(CONSUMER_UNACKNOWLEDGED, "consumer" => name).set(reader.num_ack_pending as f64);
    }
    Ok(())
}
