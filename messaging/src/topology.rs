//! Streams and durable consumers, every option written out. The only place that creates them.
//!
//! A service creates what it needs when it is absent and never updates it: a difference is reported, and an operator
//! decides. Creating a consumer that delivers everything again is safe, because effects are guarded in the database.

use std::time::Duration;

use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, PullConsumer, ReplayPolicy, pull};
use async_nats::jetstream::context::{CreateStreamErrorKind, GetStreamErrorKind};
use async_nats::jetstream::stream::{self, DiscardPolicy, RetentionPolicy, StorageType};
use async_nats::jetstream::{Context, ErrorCode};
use time::OffsetDateTime;
use tracing::info;

use shared_contracts::{
    DLQ_STREAM, Event, ORDERS_STREAM, OrderPlaced, PAYMENTS_STREAM, PaymentSettled,
};

const GIB: i64 = 1 << 30;
const MIB: i64 = 1 << 20;

/// What may differ from one installation to the next.
#[derive(Clone, Debug)]
pub struct TopologySettings {
    /// Size of ORDERS and of PAYMENTS, each.
    pub stream_max_bytes: i64,
    /// Size of DLQ.
    pub dlq_max_bytes: i64,
    /// Copies of each stream: 1 on a single server, 3 in a cluster.
    pub replicas: usize,
    /// How long the broker recognises a `Nats-Msg-Id`.
    pub duplicate_window: Duration,
    /// After this long without an ack, a message is delivered again.
    pub ack_wait: Duration,
}

impl Default for TopologySettings {
    fn default() -> Self {
        Self {
            stream_max_bytes: GIB,
            dlq_max_bytes: 128 * MIB,
            replicas: 1,
            // The id map lives in the server's memory (about 225 bytes an id), so it is kept short. It only saves work.
            duplicate_window: Duration::from_secs(120),
            ack_wait: Duration::from_secs(30),
        }
    }
}

/// A durable consumer: who reads what from which stream.
#[derive(Clone, Copy, Debug)]
pub struct Subscription {
    /// Name of the durable, `<service>-<noun>-<past>`; also the `consumer` column of inbox and dead letters.
    pub consumer: &'static str,
    /// Stream it reads.
    pub stream: &'static str,
    /// The one subject it takes.
    pub subject: &'static str,
    /// The reading service.
    pub service: &'static str,
}

/// payments takes orders to be paid.
pub const PAYMENTS_ORDER_PLACED: Subscription = Subscription {
    consumer: "payments-order-placed",
    stream: ORDERS_STREAM,
    subject: OrderPlaced::SUBJECT,
    service: "payments",
};

/// orders takes how payments ended.
pub const ORDERS_PAYMENT_SETTLED: Subscription = Subscription {
    consumer: "orders-payment-settled",
    stream: PAYMENTS_STREAM,
    subject: PaymentSettled::SUBJECT,
    service: "orders",
};

/// Where copies of dead letters of `service` go.
pub fn dlq_subject(service: &str) -> String {
    format!("gozon.dlq.{service}")
}

/// The stream of what `orders` says.
pub fn orders_stream(settings: &TopologySettings) -> stream::Config {
    event_stream(
        ORDERS_STREAM,
        "gozon.orders.>",
        settings.stream_max_bytes,
        settings,
    )
}

/// The stream of what `payments` says.
pub fn payments_stream(settings: &TopologySettings) -> stream::Config {
    event_stream(
        PAYMENTS_STREAM,
        "gozon.payments.>",
        settings.stream_max_bytes,
        settings,
    )
}

/// The stream of copies of dead letters.
pub fn dlq_stream(settings: &TopologySettings) -> stream::Config {
    event_stream(DLQ_STREAM, "gozon.dlq.>", settings.dlq_max_bytes, settings)
}

fn event_stream(
    name: &str,
    subjects: &str,
    max_bytes: i64,
    settings: &TopologySettings,
) -> stream::Config {
    stream::Config {
        name: name.to_owned(),
        subjects: vec![subjects.to_owned()],
        storage: StorageType::File,
        // Limits, not WorkQueue: a work queue forgets de-duplication ids with the acked message, and cannot be replayed.
        retention: RetentionPolicy::Limits,
        max_age: Duration::from_secs(24 * 60 * 60),
        max_bytes,
        // The stream is a cache: what it evicts, orders asks again. `New` would stop the flow instead.
        discard: DiscardPolicy::Old,
        num_replicas: settings.replicas,
        duplicate_window: settings.duplicate_window,
        // Nobody takes single messages or everything away by mistake; these two cannot be taken back.
        deny_delete: true,
        deny_purge: true,
        // Looking at a message needs no consumer.
        allow_direct: true,
        // One fsync for a whole batch instead of one a message.
        allow_atomic_publish: true,
        ..Default::default()
    }
}

/// How the durable of a subscription is made.
pub fn consumer_config(subscription: &Subscription, settings: &TopologySettings) -> pull::Config {
    pull::Config {
        durable_name: Some(subscription.consumer.to_owned()),
        name: Some(subscription.consumer.to_owned()),
        filter_subject: subscription.subject.to_owned(),
        // A consumer made anew reads the stream from its beginning: repetitions are recognised, gaps would not be.
        deliver_policy: DeliverPolicy::All,
        replay_policy: ReplayPolicy::Instant,
        ack_policy: AckPolicy::Explicit,
        ack_wait: settings.ack_wait,
        // For ever: reaching a limit would park the message silently. What cannot be handled is dead-lettered by us.
        max_deliver: -1,
        // Enough for five replicas with two batches each in flight.
        max_ack_pending: 2000,
        num_replicas: settings.replicas,
        ..Default::default()
    }
}

/// Whether something had to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Ensured {
    /// It was there.
    Found,
    /// It was absent and has been made: whatever was in it before is gone.
    Made,
}

/// A stream as the broker has it right now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamState {
    /// When it was made. Another time is another stream, whoever made it.
    pub made_at: OffsetDateTime,
    /// The newest sequence. Lower than one that was acknowledged: the broker has lost its end.
    pub last_sequence: u64,
    /// In which options it differs from what this version would make.
    pub drift: Vec<String>,
}

impl StreamState {
    fn new(found: &stream::Info, wanted: &stream::Config) -> Self {
        Self {
            made_at: found.created,
            last_sequence: found.state.last_sequence,
            drift: drift(&found.config, wanted),
        }
    }
}

/// Makes the stream if it is absent; never changes one that differs.
pub async fn ensure_stream(
    jetstream: &Context,
    wanted: &stream::Config,
) -> anyhow::Result<(StreamState, Ensured)> {
    match jetstream.get_stream(&wanted.name).await {
        Ok(stream) => {
            return Ok((
                StreamState::new(stream.cached_info(), wanted),
                Ensured::Found,
            ));
        }
        Err(error) => match error.kind() {
            GetStreamErrorKind::JetStream(error)
                if error.error_code() == ErrorCode::STREAM_NOT_FOUND => {}
            _ => {
                return Err(anyhow::Error::new(error)
                    .context(format!("stream {} cannot be looked up", wanted.name)));
            }
        },
    }
    match jetstream.create_stream(wanted.clone()).await {
        Ok(stream) => {
            info!(stream = wanted.name, "Stream made");
            Ok((
                StreamState::new(stream.cached_info(), wanted),
                Ensured::Made,
            ))
        }
        Err(error) => {
            match error.kind() {
                CreateStreamErrorKind::JetStream(error)
                    if error.error_code() == ErrorCode::STORAGE_RESOURCES_EXCEEDED =>
                {
                    anyhow::bail!(
                        "the NATS server has no room for stream {}, which may grow to {} bytes: raise `max_file` in its configuration \
                     above the sum of all streams, or lower GOZON_STREAM_MAX_BYTES",
                        wanted.name,
                        wanted.max_bytes
                    )
                }
                _ => Err(anyhow::Error::new(error)
                    .context(format!("stream {} cannot be made", wanted.name))),
            }
        }
    }
}

/// There is no stream that a consumer could read.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("stream {0} does not exist yet; the service that owns it makes it")]
pub struct NoStream(pub &'static str);

/// Finds the durable consumer, or makes it if it is absent.
pub async fn ensure_consumer(
    jetstream: &Context,
    subscription: &Subscription,
    settings: &TopologySettings,
) -> anyhow::Result<(PullConsumer, Ensured)> {
    use async_nats::jetstream::stream::ConsumerErrorKind;

    match jetstream
        .get_consumer_from_stream(subscription.consumer, subscription.stream)
        .await
    {
        Ok(consumer) => return Ok((consumer, Ensured::Found)),
        Err(error) => match error.kind() {
            ConsumerErrorKind::JetStream(error)
                if error.error_code() == ErrorCode::CONSUMER_NOT_FOUND => {}
            ConsumerErrorKind::JetStream(error)
                if error.error_code() == ErrorCode::STREAM_NOT_FOUND =>
            {
                return Err(NoStream(subscription.stream).into());
            }
            _ => {
                let context = format!("consumer {} cannot be looked up", subscription.consumer);
                return Err(anyhow::Error::new(error).context(context));
            }
        },
    }
    // Strict: if a replica was faster with another configuration, its consumer stays as it is.
    match jetstream
        .create_consumer_strict_on_stream(
            consumer_config(subscription, settings),
            subscription.stream,
        )
        .await
    {
        Ok(consumer) => {
            info!(
                consumer = subscription.consumer,
                stream = subscription.stream,
                "Consumer made"
            );
            Ok((consumer, Ensured::Made))
        }
        Err(error) => Err(anyhow::Error::new(error)
            .context(format!("consumer {} cannot be made", subscription.consumer))),
    }
}

/// In which options that matter the stream differs from what this version would make.
pub fn drift(found: &stream::Config, wanted: &stream::Config) -> Vec<String> {
    let mut differences = Vec::new();
    let mut compare = |option: &str, found: String, wanted: String| {
        if found != wanted {
            differences.push(format!("{option} is {found}, not {wanted}"));
        }
    };
    compare(
        "subjects",
        format!("{:?}", found.subjects),
        format!("{:?}", wanted.subjects),
    );
    compare(
        "storage",
        format!("{:?}", found.storage),
        format!("{:?}", wanted.storage),
    );
    compare(
        "retention",
        format!("{:?}", found.retention),
        format!("{:?}", wanted.retention),
    );
    compare(
        "max_age",
        format!("{:?}", found.max_age),
        format!("{:?}", wanted.max_age),
    );
    compare(
        "max_bytes",
        found.max_bytes.to_string(),
        wanted.max_bytes.to_string(),
    );
    compare(
        "discard",
        format!("{:?}", found.discard),
        format!("{:?}", wanted.discard),
    );
    compare(
        "num_replicas",
        found.num_replicas.to_string(),
        wanted.num_replicas.to_string(),
    );
    compare(
        "duplicate_window",
        format!("{:?}", found.duplicate_window),
        format!("{:?}", wanted.duplicate_window),
    );
    compare(
        "deny_delete",
        found.deny_delete.to_string(),
        wanted.deny_delete.to_string(),
    );
    compare(
        "deny_purge",
        found.deny_purge.to_string(),
        wanted.deny_purge.to_string(),
    );
    compare(
        "allow_direct",
        found.allow_direct.to_string(),
        wanted.allow_direct.to_string(),
    );
    compare(
        "allow_atomic_publish",
        found.allow_atomic_publish.to_string(),
        wanted.allow_atomic_publish.to_string(),
    );
    differences
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drift_names_what_differs() {
        let settings = TopologySettings::default();
        let wanted = orders_stream(&settings);
        assert_eq!(drift(&wanted, &wanted), Vec::<String>::new());
        let found = stream::Config {
            max_bytes: 5,
            deny_purge: false,
            ..wanted.clone()
        };
        let expected = vec![
            "max_bytes is 5, not 1073741824".to_owned(),
            "deny_purge is false, not true".to_owned(),
        ];
        assert_eq!(drift(&found, &wanted), expected);
    }
}
