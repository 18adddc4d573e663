//! What the flow counts while it runs, and what waits in its tables, looked up when somebody asks how it goes.

use metrics::{describe_counter, describe_histogram};
use sea_orm::{ConnectionTrait as _, DatabaseConnection, DbErr};

use crate::broker::Broker;
use crate::db::sql;
use crate::desk;
use crate::topology::Subscription;

/// Counting goes no further: who has this many waiting needs no exact number.
const COUNT_MAX: i64 = 100_000;

pub(crate) const PUBLISHED: &str = "gozon_published_total";
pub(crate) const PUBLISH_SECONDS: &str = "gozon_publish_duration_seconds";
pub(crate) const MESSAGES: &str = "gozon_messages_total";
/// From its beginning to its commit. Whoever runs one says which work it was.
pub const TRANSACTION_SECONDS: &str = "gozon_transaction_duration_seconds";

/// Says what is counted here. Once, at start.
pub fn describe() {
    describe_counter!(
        PUBLISHED,
        "Outbox rows that the broker acknowledged, or did not"
    );
    describe_histogram!(
        PUBLISH_SECONDS,
        "From sending a batch of outbox rows to the last answer of the broker"
    );
    describe_counter!(
        MESSAGES,
        "Messages taken: facts seen for the first time, repetitions, dead letters"
    );
    describe_histogram!(
        TRANSACTION_SECONDS,
        "A transaction of the flow, from begin to commit, by its work"
    );
}

/// Something that waits: its name, what it is, what tells it from others of its name, how much.
pub type Gauge = (&'static str, &'static str, Vec<(&'static str, String)>, f64);

/// Looks.
pub async fn look(db: &DatabaseConnection) -> Result<Vec<Gauge>, DbErr> {
    let row = db
        .query_one_raw(sql(
            "SELECT count(*) AS rows, coalesce(extract(epoch FROM clock_timestamp() - min(created_at)), 0)::float8 AS oldest,
                    (SELECT count(*) FROM dead_letters WHERE kind = 'poison' AND (replayed_at IS NULL OR last_seen_at > replayed_at)) AS poison,
                    (SELECT count(*) FROM dead_letters WHERE kind = 'quarantine' AND (replayed_at IS NULL OR last_seen_at > replayed_at)) AS quarantine
             FROM (SELECT created_at FROM outbox WHERE published_at IS NULL ORDER BY event_id, n LIMIT $1) AS waiting",
            [COUNT_MAX.into()],
        ))
        .await?
        .ok_or_else(|| DbErr::RecordNotFound("a count".to_owned()))?;
    let count = |name: &str| row.try_get::<i64>("", name).map(|count| count as f64);
    let kind = |kind: &str| vec![("kind", kind.to_owned())];
    let dead = "Dead letters that wait for a person";
    Ok(vec![
        (
            "gozon_outbox_pending",
            "Outbox rows that are not published yet; counts to 100000",
            Vec::new(),
            count("rows")?,
        ),
        (
            "gozon_outbox_oldest_pending_age_seconds",
            "How long the oldest of them has waited",
            Vec::new(),
            row.try_get("", "oldest")?,
        ),
        ("gozon_dead_letters", dead, kind("poison"), count("poison")?),
        (
            "gozon_dead_letters",
            dead,
            kind("quarantine"),
            count("quarantine")?,
        ),
    ])
}

/// Looks at the broker: how full the service's stream is, and how far its reader, another service that may be away, is
/// behind. What is not there is left out, and so is everything while the broker is away.
pub async fn look_at_broker(broker: &Broker, reader: &Subscription) -> Vec<Gauge> {
    let mut gauges = Vec::new();
    if !broker.is_connected() {
        return gauges;
    }
    let (lag, found) = tokio::join!(
        desk::lag(broker, reader),
        broker.jetstream().get_stream(reader.stream)
    );
    if let Some(lag) = lag {
        let consumer = || vec![("consumer", lag.name.clone())];
        let (pending, unacknowledged) = (lag.pending as f64, lag.ack_pending as f64);
        gauges.push((
            "gozon_consumer_pending",
            "Messages that the consumer has not been given yet",
            consumer(),
            pending,
        ));
        let help = "Messages that it was given and has not acknowledged";
        gauges.push((
            "gozon_consumer_unacknowledged",
            help,
            consumer(),
            unacknowledged,
        ));
    }
    if let Ok(found) = found {
        let info = found.cached_info();
        let name = || vec![("stream", reader.stream.to_owned())];
        gauges.push((
            "gozon_stream_messages",
            "Messages in the stream",
            name(),
            info.state.messages as f64,
        ));
        gauges.push((
            "gozon_stream_bytes",
            "Their size",
            name(),
            info.state.bytes as f64,
        ));
        gauges.push((
            "gozon_stream_max_bytes",
            "At this size the oldest go",
            name(),
            info.config.max_bytes as f64,
        ));
    }
    gauges
}
