//! Looking at one order, at the outboxes, and at the streams.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use async_nats::jetstream::context::GetStreamErrorKind;
use async_nats::jetstream::{self, ErrorCode};
use messaging::{Backlog, Resend, Stream, Subscriber as _, Subscription, TopologySettings};
use orders::Settle;
use payments::Charge;
use sea_orm::{ConnectionTrait as _, DatabaseConnection, DbBackend, Statement, Value as SqlValue};
use serde::Serialize;
use serde_json::{Value, json};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::audit::Databases;

/// Everything that both databases hold about an order, table by table.
pub async fn order(databases: &Databases, id: Uuid) -> anyhow::Result<Value> {
    let orders = &databases.orders;
    let payments = &databases.payments;
    let order = json_rows(orders, "SELECT * FROM orders WHERE id = $1", id).await?;
    let decision = json_rows(payments, "SELECT * FROM payments WHERE order_id = $1", id).await?;
    let dead_letters = "SELECT id, kind, cause FROM dead_letters WHERE order_id = $1";
    let dead_letters = [
        json_rows(orders, dead_letters, id).await?,
        json_rows(payments, dead_letters, id).await?,
    ]
    .concat();
    anyhow::ensure!(
        !order.is_empty() || !decision.is_empty(),
        "no database knows order {id}"
    );
    Ok(json!({
        "order": order.first(),
        "requests": json_rows(orders, "SELECT b.* FROM outbox b JOIN orders o ON b.event_id = o.placed_event_id WHERE o.id = $1 ORDER BY n", id).await?,
        "taken_by_payments": json_rows(payments, "SELECT i.* FROM inbox i JOIN payments p ON i.consumer = 'payments-order-placed' AND i.event_id = p.request_event_id WHERE p.order_id = $1", id).await?,
        "decision": decision.first(),
        "debits": json_rows(payments, "SELECT * FROM transfers WHERE kind = 'payment' AND order_id = $1", id).await?,
        "answers": json_rows(payments, "SELECT b.* FROM outbox b JOIN payments p ON b.event_id = p.event_id WHERE p.order_id = $1 ORDER BY n", id).await?,
        "taken_by_orders": json_rows(orders, "SELECT i.* FROM inbox i JOIN orders o ON i.consumer = 'orders-payment-settled' AND i.event_id = o.settlement_event_id WHERE o.id = $1", id).await?,
        "ends": json_rows(orders, "SELECT b.* FROM outbox b JOIN orders o ON b.event_id = o.final_event_id WHERE o.id = $1 ORDER BY n", id).await?,
        "dead_letters": dead_letters,
    }))
}

async fn json_rows(db: &DatabaseConnection, query: &str, id: Uuid) -> anyhow::Result<Vec<Value>> {
    let query = format!("SELECT row_to_json(t)::text AS row FROM ({query}) t");
    let rows = db
        .query_all_raw(Statement::from_sql_and_values(
            DbBackend::Postgres,
            query,
            [SqlValue::from(id)],
        ))
        .await?;
    rows.iter()
        .map(|row| Ok(serde_json::from_str(&row.try_get::<String>("", "row")?)?))
        .collect()
}

/// How an outbox is.
#[derive(Clone, Debug, Serialize)]
pub struct Outbox {
    /// Whose.
    pub service: &'static str,
    /// Rows that wait.
    pub pending: i64,
    /// How long the oldest has waited.
    pub oldest_seconds: f64,
    /// Most tries that a waiting row has had.
    pub attempts_max: i32,
}

/// Both outboxes.
pub async fn outboxes(databases: &Databases) -> anyhow::Result<Vec<Outbox>> {
    let mut outboxes = Vec::new();
    for (service, db) in [
        ("orders", &databases.orders),
        ("payments", &databases.payments),
    ] {
        let backlog = Backlog::read(db).await?;
        outboxes.push(Outbox {
            service,
            pending: backlog.outbox_pending,
            oldest_seconds: backlog.outbox_oldest_seconds,
            attempts_max: backlog.outbox_attempts_max,
        });
    }
    Ok(outboxes)
}

/// How many messages of a service are published again.
#[derive(Clone, Debug, Serialize)]
pub struct Resent {
    /// Whose.
    pub service: &'static str,
    /// How many.
    pub messages: u64,
    /// Those of them that were published so lately that the broker takes them for repetitions, and stores nothing, if it
    /// still remembers them.
    pub recent: u64,
}

/// Has what both services published since a time published again; with `dry_run`, only counts it.
pub async fn resend(
    databases: &Databases,
    since: OffsetDateTime,
    subject: Option<&str>,
    dry_run: bool,
    duplicate_window: Duration,
) -> anyhow::Result<Vec<Resent>> {
    let mut resent = Vec::new();
    for (service, db) in [
        ("orders", &databases.orders),
        ("payments", &databases.payments),
    ] {
        let resend = Resend { since, subject };
        let recent = resend.count_remembered(db, duplicate_window).await?;
        let messages = match dry_run {
            true => resend.count(db).await?,
            false => resend.run(db).await?,
        };
        resent.push(Resent {
            service,
            messages,
            recent,
        });
    }
    Ok(resent)
}

/// A stream or durable consumer, against what this version would make.
#[derive(Clone, Debug, Serialize)]
pub struct Part {
    /// `stream ORDERS` or `consumer payments-order-placed`.
    pub name: String,
    /// Whether it is there.
    pub there: bool,
    /// In which options it differs.
    pub drift: Vec<String>,
    /// What was changed just now.
    pub changed: Vec<String>,
    /// Messages stored, or not delivered yet.
    pub messages: u64,
    /// Messages delivered without an ack (consumers).
    pub ack_pending: u64,
    /// Messages delivered more than once and not acknowledged yet (consumers).
    pub redelivered: u64,
}

/// What is to be done about what differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Apply {
    /// Nothing.
    Look,
    /// What is absent is made, what differs is changed.
    Grow,
    /// Also where a stream gets smaller or has fewer copies then.
    Shrink,
}

/// All streams and durable consumers.
pub async fn topology(
    jetstream: &jetstream::Context,
    settings: &TopologySettings,
    apply: Apply,
) -> anyhow::Result<Vec<Part>> {
    let mut parts = Vec::new();
    let [orders, dead_letters] = orders::STREAMS;
    let [payments, _] = payments::STREAMS;
    let all = [orders, payments, dead_letters];
    if apply == Apply::Grow {
        // Before anything is changed: told other settings than the services, this would take away what they were given.
        for stream in &all {
            if let Some(found) = find_stream(jetstream, stream.name).await? {
                refuse_to_shrink(&found.config, &stream.config(settings))?;
            }
        }
    }
    for stream in all {
        parts.push(stream_part(jetstream, &stream, settings, apply).await?);
    }
    for subscription in [Charge::SUBSCRIPTION, Settle::SUBSCRIPTION] {
        parts.push(consumer(jetstream, &subscription, settings, apply).await?);
    }
    Ok(parts)
}

async fn stream_part(
    jetstream: &jetstream::Context,
    stream: &Stream,
    settings: &TopologySettings,
    apply: Apply,
) -> anyhow::Result<Part> {
    let mut changed = Vec::new();
    if apply != Apply::Look {
        changed = match find_stream(jetstream, stream.name).await? {
            Some(found) => stream.drift(&found.config, settings),
            None => vec!["absent".to_owned()],
        };
        let applied = jetstream
            .create_or_update_stream(stream.config(settings))
            .await;
        applied.with_context(|| format!("stream {} cannot be changed", stream.name))?;
    }
    let found = find_stream(jetstream, stream.name).await?;
    let info = found.as_ref();
    Ok(Part {
        name: format!("stream {}", stream.name),
        there: info.is_some(),
        drift: info
            .map(|info| stream.drift(&info.config, settings))
            .unwrap_or_default(),
        changed,
        messages: info.map_or(0, |info| info.state.messages),
        ack_pending: 0,
        redelivered: 0,
    })
}

/// None if it is absent. Who does not answer has not said so.
async fn find_stream(
    jetstream: &jetstream::Context,
    name: &str,
) -> anyhow::Result<Option<jetstream::stream::Info>> {
    match jetstream.get_stream(name).await {
        Ok(stream) => Ok(Some(stream.cached_info().clone())),
        Err(error) => match error.kind() {
            GetStreamErrorKind::JetStream(error)
                if error.error_code() == ErrorCode::STREAM_NOT_FOUND =>
            {
                Ok(None)
            }
            _ => {
                Err(anyhow::Error::new(error).context(format!("stream {name} cannot be looked up")))
            }
        },
    }
}

fn refuse_to_shrink(
    found: &jetstream::stream::Config,
    wanted: &jetstream::stream::Config,
) -> anyhow::Result<()> {
    let smaller = found.max_bytes < 0 || wanted.max_bytes < found.max_bytes;
    ensure!(
        !smaller && wanted.num_replicas >= found.num_replicas,
        "stream {} has {} bytes in {} copies and would have {} in {}: give gozon the settings that the services have, or \
         --shrink if that is meant. Nothing was changed",
        wanted.name,
        found.max_bytes,
        found.num_replicas,
        wanted.max_bytes,
        wanted.num_replicas
    );
    Ok(())
}

async fn consumer(
    jetstream: &jetstream::Context,
    subscription: &Subscription,
    settings: &TopologySettings,
    apply: Apply,
) -> anyhow::Result<Part> {
    let wanted = subscription.config(settings);
    let find = async || {
        let (name, stream) = (subscription.consumer, subscription.stream);
        jetstream
            .get_consumer_from_stream::<jetstream::consumer::pull::Config, _, _>(name, stream)
            .await
            .ok()
    };
    let mut changed = Vec::new();
    if apply != Apply::Look {
        changed = match find().await {
            Some(consumer) => consumer_drift(&consumer.cached_info().config, &wanted),
            None => vec!["absent".to_owned()],
        };
        let applied = jetstream
            .create_consumer_on_stream(wanted.clone(), subscription.stream)
            .await;
        applied.with_context(|| format!("consumer {} cannot be changed", subscription.consumer))?;
    }
    let found = find().await;
    let info = found.as_ref().map(|consumer| consumer.cached_info());
    Ok(Part {
        name: format!("consumer {}", subscription.consumer),
        there: info.is_some(),
        drift: info
            .map(|info| consumer_drift(&info.config, &wanted))
            .unwrap_or_default(),
        changed,
        messages: info.map_or(0, |info| info.num_pending),
        ack_pending: info.map_or(0, |info| info.num_ack_pending as u64),
        redelivered: info.map_or(0, |info| info.num_redelivered as u64),
    })
}

fn consumer_drift(
    found: &jetstream::consumer::Config,
    wanted: &jetstream::consumer::pull::Config,
) -> Vec<String> {
    let mut drift = Vec::new();
    let mut compare = |option: &str, found: String, wanted: String| {
        if found != wanted {
            drift.push(format!("{option} is {found}, not {wanted}"));
        }
    };
    compare(
        "filter_subject",
        found.filter_subject.clone(),
        wanted.filter_subject.clone(),
    );
    compare(
        "ack_wait",
        format!("{:?}", found.ack_wait),
        format!("{:?}", wanted.ack_wait),
    );
    compare(
        "max_deliver",
        found.max_deliver.to_string(),
        wanted.max_deliver.to_string(),
    );
    compare(
        "max_ack_pending",
        found.max_ack_pending.to_string(),
        wanted.max_ack_pending.to_string(),
    );
    compare(
        "ack_policy",
        format!("{:?}", found.ack_policy),
        format!("{:?}", wanted.ack_policy),
    );
    compare(
        "num_replicas",
        found.num_replicas.to_string(),
        wanted.num_replicas.to_string(),
    );
    drift
}
