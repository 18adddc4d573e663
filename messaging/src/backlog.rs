//! What waits in the tables of a service. One query serves the operator's page, the gauges and
//! `gozon outbox`.

use anyhow::Context as _;
use async_nats::jetstream::consumer::{self, PullConsumer};
use broker::Broker;
use futures_util::TryStreamExt as _;
use metrics::{describe_gauge, gauge};
use sea_orm::{DatabaseConnection, DbErr, FromQueryResult};
use serde::Serialize;
use utoipa::ToSchema;

use crate::postgres::{one_row, sql};

/// Counting stops here: beyond it nobody needs an exact number.
const COUNT_MAX: i64 = 100_000;

const OUTBOX_PENDING: &str = "gozon_outbox_pending";
const OUTBOX_OLDEST: &str = "gozon_outbox_oldest_pending_age_seconds";
const DEAD_LETTERS: &str = "gozon_dead_letters";
const CONSUMER_PENDING: &str = "gozon_consumer_pending";
const CONSUMER_UNACKNOWLEDGED: &str = "gozon_consumer_unacknowledged";
const STREAM_MESSAGES: &str = "gozon_stream_messages";
const STREAM_BYTES: &str = "gozon_stream_bytes";
const STREAM_MAX_BYTES: &str = "gozon_stream_max_bytes";

#[derive(Clone, Debug, FromQueryResult, Serialize, ToSchema)]
pub struct Backlog {
    /// Outbox rows that are not published yet. Counts to 100000.
    pub outbox_pending: i64,
    /// Age of the oldest of them.
    pub outbox_oldest_seconds: f64,
    /// The most attempts to publish one of them.
    pub outbox_attempts_max: i32,
    /// Dead letters that could not be handled and wait for an operator.
    pub poison: i64,
    /// Dead letters that contradict what is decided and wait for an operator.
    pub quarantine: i64,
}

impl Backlog {
    pub async fn read(db: &DatabaseConnection) -> Result<Self, DbErr> {
        // The outer join yields one row of nulls when nothing waits.
        let query = "
        SELECT count(waiting.created_at) AS outbox_pending,
               coalesce(extract(epoch FROM clock_timestamp() - min(created_at)), 0)::float8
                   AS outbox_oldest_seconds,
               coalesce(max(attempts), 0) AS outbox_attempts_max,
               letters.poison, letters.quarantine
        FROM (SELECT count(*) FILTER (WHERE kind = 'poison') AS poison,
                     count(*) FILTER (WHERE kind = 'quarantine') AS quarantine
              FROM dead_letters
              WHERE replayed_at IS NULL OR last_seen_at > replayed_at) AS letters
             LEFT JOIN
             (SELECT created_at, attempts FROM outbox
              WHERE published_at IS NULL ORDER BY event_id, n LIMIT $1) AS waiting ON true
        GROUP BY letters.poison, letters.quarantine";
        one_row(db, sql(query, [COUNT_MAX.into()])).await
    }
}

/// What a consumer has not done yet, as the broker sees it.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ConsumerLag {
    pub name: String,
    /// Messages that were not delivered yet.
    pub pending: u64,
    /// Messages that were delivered and are not acknowledged yet.
    pub ack_pending: u64,
    /// Of these, the ones that were delivered more than once.
    pub redelivered: u64,
}

/// None while the broker is away or the consumer does not exist.
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
        "Outbox rows that are not published yet; counts to 100000"
    );
    describe_gauge!(OUTBOX_OLDEST, "Age of the oldest of them");
    describe_gauge!(DEAD_LETTERS, "Dead letters that wait for an operator");
    describe_gauge!(
        CONSUMER_PENDING,
        "Messages that the consumer has not been given yet"
    );
    describe_gauge!(
        CONSUMER_UNACKNOWLEDGED,
        "Messages that the consumer was given and has not acknowledged"
    );
    describe_gauge!(STREAM_MESSAGES, "Messages in the stream");
    describe_gauge!(STREAM_BYTES, "Size of the stream");
    describe_gauge!(
        STREAM_MAX_BYTES,
        "Size at which the stream drops its oldest messages"
    );
}

pub(crate) async fn set_gauges(db: &DatabaseConnection) -> Result<(), DbErr> {
    let found = Backlog::read(db).await?;
    gauge!(OUTBOX_PENDING).set(found.outbox_pending as f64);
    gauge!(OUTBOX_OLDEST).set(found.outbox_oldest_seconds);
    gauge!(DEAD_LETTERS, "kind" => "poison").set(found.poison as f64);
    gauge!(DEAD_LETTERS, "kind" => "quarantine").set(found.quarantine as f64);
    Ok(())
}

/// How full a stream is, and how far each of its durable readers is behind. Readers belong to other
/// services, which may be away.
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
        .context("the consumers cannot be listed")?;
    for reader in readers {
        let Some(name) = reader.config.durable_name else {
            continue;
        };
        gauge!(CONSUMER_PENDING, "consumer" => name.clone()).set(reader.num_pending as f64);
        gauge!(CONSUMER_UNACKNOWLEDGED, "consumer" => name).set(reader.num_ack_pending as f64);
    }
    Ok(())
}
