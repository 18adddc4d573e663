//! Streams and durable consumers: compares them with what this version creates, and applies it.

use anyhow::{Context as _, ensure};
use async_nats::jetstream::context::GetStreamErrorKind;
use async_nats::jetstream::{self, ErrorCode};
use messaging::{Stream, Subscriber as _, Subscription, TopologySettings};
use orders::Settle;
use payments::Charge;
use serde::Serialize;

/// A stream or durable consumer, compared with what this version creates.
#[derive(Clone, Debug, Serialize)]
pub struct TopologyItem {
    /// `stream ORDERS` or `consumer payments-order-placed`.
    pub name: String,
    pub there: bool,
    /// Options that differ.
    pub drift: Vec<String>,
    /// Options that this call has changed.
    pub changed: Vec<String>,
    /// Stored messages of a stream, undelivered messages of a consumer.
    pub messages: u64,
    /// Consumers: messages delivered but not acknowledged.
    pub ack_pending: u64,
    /// Consumers: messages delivered more than once and not acknowledged.
    pub redelivered: u64,
}

/// What to do about differences.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Apply {
    CheckOnly,
    /// Creates what is missing and changes what differs, unless a stream would shrink.
    Grow,
    /// Also makes streams smaller and reduces their number of replicas.
    Shrink,
}

/// Checks all streams and durable consumers.
pub async fn check(
    jetstream: &jetstream::Context,
    settings: &TopologySettings,
    apply: Apply,
) -> anyhow::Result<Vec<TopologyItem>> {
    let mut items = Vec::new();
    let [orders, dead_letters] = orders::STREAMS;
    let [payments, _] = payments::STREAMS;
    let all = [orders, payments, dead_letters];
    if apply == Apply::Grow {
        // Checked before anything is changed: if gozon and the services have different settings,
        // applying them could delete messages.
        for stream in &all {
            if let Some(found) = find_stream(jetstream, stream.name).await? {
                refuse_to_shrink(&found.config, &stream.config(settings))?;
            }
        }
    }
    for stream in all {
        items.push(apply_stream(jetstream, &stream, settings, apply).await?);
    }
    for subscription in [Charge::SUBSCRIPTION, Settle::SUBSCRIPTION] {
        items.push(apply_consumer(jetstream, &subscription, settings, apply).await?);
    }
    Ok(items)
}

async fn apply_stream(
    jetstream: &jetstream::Context,
    stream: &Stream,
    settings: &TopologySettings,
    apply: Apply,
) -> anyhow::Result<TopologyItem> {
    let mut changed = Vec::new();
    if apply != Apply::CheckOnly {
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
    Ok(TopologyItem {
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

/// `None` if the broker says that the stream does not exist. No answer is an error.
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
            _ => Err(anyhow::Error::new(error)
                .context(format!("the state of stream {name} cannot be read"))),
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
        "stream {} has max_bytes {} and {} replicas; it would get {} and {}. Nothing was changed. \
         Run gozon with the services' settings, or add --shrink to shrink the stream",
        wanted.name,
        found.max_bytes,
        found.num_replicas,
        wanted.max_bytes,
        wanted.num_replicas
    );
    Ok(())
}

async fn apply_consumer(
    jetstream: &jetstream::Context,
    subscription: &Subscription,
    settings: &TopologySettings,
    apply: Apply,
) -> anyhow::Result<TopologyItem> {
    let find = async || {
        let (name, stream) = (subscription.consumer, subscription.stream);
        jetstream
            .get_consumer_from_stream::<jetstream::consumer::pull::Config, _, _>(name, stream)
            .await
            .ok()
    };
    let existing = find().await;
    let stream = jetstream.get_stream(subscription.stream).await.ok();
    let last_sequence = stream.map_or(0, |stream| stream.cached_info().state.last_sequence);
    let mut wanted = subscription.config(settings, last_sequence);
    if let Some(consumer) = &existing {
        // Where it began cannot be changed.
        wanted.deliver_policy = consumer.cached_info().config.deliver_policy;
    }
    let mut changed = Vec::new();
    if apply != Apply::CheckOnly {
        changed = match &existing {
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
    Ok(TopologyItem {
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
