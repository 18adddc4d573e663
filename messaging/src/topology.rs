//! Configures streams and durable consumers. Nothing else creates them.
//!
//! A service creates missing streams and consumers and never updates existing ones: it reports a
//! difference, and an operator decides. Recreating a consumer that delivers everything again is
//! safe, because effects are guarded in the database.

use std::time::Duration;

use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, PullConsumer, ReplayPolicy, pull};
use async_nats::jetstream::context::{CreateStreamErrorKind, GetStreamErrorKind};
use async_nats::jetstream::stream::{
    self, ConsumerErrorKind, DiscardPolicy, RetentionPolicy, StorageType,
};
use async_nats::jetstream::{Context, ErrorCode};
use time::OffsetDateTime;
use tracing::{info, warn};

const GIB: i64 = 1 << 30;
const MIB: i64 = 1 << 20;

/// Settings that differ between installations. Services and `gozon` must have the same values.
#[derive(Clone, Debug, clap::Args)]
pub struct TopologySettings {
    /// Size limit of each event stream when it is created.
    #[arg(long, env = "GOZON_STREAM_MAX_BYTES", default_value_t = GIB)]
    pub stream_max_bytes: i64,
    /// Size limit of the stream of dead letters when it is created.
    #[arg(long, env = "GOZON_DLQ_MAX_BYTES", default_value_t = 128 * MIB)]
    pub dlq_max_bytes: i64,
    /// Copies of each stream and consumer: 1 on a single NATS server, 3 in a cluster.
    #[arg(
        long = "stream-replicas",
        env = "GOZON_STREAM_REPLICAS",
        default_value_t = 1
    )]
    pub replicas: usize,
    /// How long the broker remembers message ids to drop duplicates.
    // Short, because the server keeps the ids in memory (about 225 bytes each), and dropping
    // duplicates only saves work.
    #[arg(long, env = "GOZON_DUPLICATE_WINDOW_MS", default_value_t = 120_000)]
    pub duplicate_window_ms: u64,
    /// The broker redelivers an unacknowledged message after this time.
    #[arg(long, env = "GOZON_ACK_WAIT_MS", default_value_t = 30_000)]
    pub ack_wait_ms: u64,
}

impl Default for TopologySettings {
    fn default() -> Self {
        Self {
            stream_max_bytes: GIB,
            dlq_max_bytes: 128 * MIB,
            replicas: 1,
            duplicate_window_ms: 120_000,
            ack_wait_ms: 30_000,
        }
    }
}

/// A stream that a service owns and creates if it is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    pub name: &'static str,
    /// `prefix.>`
    subjects: &'static str,
    content: Content,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    Events,
    DeadLetters,
}

impl Stream {
    /// A stream of the events on `subjects`, which has the form `prefix.>`.
    pub const fn events(name: &'static str, subjects: &'static str) -> Self {
        Self {
            name,
            subjects,
            content: Content::Events,
        }
    }

    /// A stream of copies of dead letters, for tools. Each service publishes on `prefix.<service>`.
    pub const fn dead_letters(name: &'static str, subjects: &'static str) -> Self {
        Self {
            name,
            subjects,
            content: Content::DeadLetters,
        }
    }

    pub(crate) fn holds_dead_letters(&self) -> bool {
        self.content == Content::DeadLetters
    }

    /// The subject on which `service` publishes in this stream.
    pub(crate) fn subject_of(&self, service: &str) -> String {
        self.subjects.replace('>', service)
    }

    /// Options of an existing stream that differ from what this version would create.
    pub fn drift(&self, found: &stream::Config, settings: &TopologySettings) -> Vec<String> {
        drift(found, &self.config(settings))
    }

    pub fn config(&self, settings: &TopologySettings) -> stream::Config {
        stream::Config {
            name: self.name.to_owned(),
            subjects: vec![self.subjects.to_owned()],
            storage: StorageType::File,
            // Limits, not WorkQueue: a work queue forgets the message id when a message is acked,
            // and cannot be replayed.
            retention: RetentionPolicy::Limits,
            max_age: Duration::from_secs(24 * 60 * 60),
            max_bytes: match self.content {
                Content::Events => settings.stream_max_bytes,
                Content::DeadLetters => settings.dlq_max_bytes,
            },
            // The stream is a cache: an evicted request is re-asked. With `New`, a full stream
            // would reject new messages.
            discard: DiscardPolicy::Old,
            num_replicas: settings.replicas,
            duplicate_window: Duration::from_millis(settings.duplicate_window_ms),
            // Prevents accidental deletion of messages. These two options cannot be undone.
            deny_delete: true,
            deny_purge: true,
            // Reading a message needs no consumer.
            allow_direct: true,
            // Allows one fsync per batch instead of one per message.
            allow_atomic_publish: true,
            ..Default::default()
        }
    }
}

/// A durable consumer: which service reads which subject of which stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subscription {
    /// Name of the durable, `<service>-<noun>-<past>`; also the `consumer` column of inbox and
    /// dead letters.
    pub consumer: &'static str,
    pub stream: &'static str,
    pub subject: &'static str,
    /// The service that reads.
    pub service: &'static str,
    /// Where it begins to read when it is created.
    pub begins: Begins,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begins {
    /// With the oldest message of the stream.
    Oldest,
    /// With the newest messages if the stream holds many; skipped requests are re-asked. Otherwise
    /// a recreated durable would deliver old messages first, for minutes.
    Newest,
}

/// A request without permission gets no answer.
const INFO_TIMEOUT: Duration = Duration::from_secs(2);
/// Number of stored messages that a durable with [`Begins::Newest`] delivers: one or two seconds of
/// work. In a new installation these are all messages.
const NEWEST: u64 = 10_000;

impl Subscription {
    /// The configuration of a durable that is created on a stream whose last sequence is
    /// `last_sequence`.
    pub fn config(&self, settings: &TopologySettings, last_sequence: u64) -> pull::Config {
        pull::Config {
            durable_name: Some(self.consumer.to_owned()),
            name: Some(self.consumer.to_owned()),
            filter_subject: self.subject.to_owned(),
            deliver_policy: match self.begins {
                Begins::Newest if last_sequence > NEWEST => DeliverPolicy::ByStartSequence {
                    start_sequence: last_sequence - NEWEST + 1,
                },
                _ => DeliverPolicy::All,
            },
            replay_policy: ReplayPolicy::Instant,
            ack_policy: AckPolicy::Explicit,
            ack_wait: Duration::from_millis(settings.ack_wait_ms),
            // No limit: at a limit, the broker would silently stop delivering the message. A
            // message that cannot be handled becomes a dead letter instead.
            max_deliver: -1,
            // Enough for five replicas with two batches each in flight.
            max_ack_pending: 2000,
            num_replicas: settings.replicas,
            ..Default::default()
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum Ensured {
    Found,
    /// It was missing and is new: its former content is lost.
    Created,
}

/// The current state of a stream in the broker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StreamState {
    /// A different time means a different stream, even if another process created it.
    pub(crate) created_at: OffsetDateTime,
    /// If it is lower than an acknowledged sequence, the broker has lost its newest messages.
    pub(crate) last_sequence: u64,
    /// Options that differ from what this version would create.
    pub(crate) drift: Vec<String>,
}

impl StreamState {
    fn new(found: &stream::Info, wanted: &stream::Config) -> Self {
        Self {
            created_at: found.created,
            last_sequence: found.state.last_sequence,
            drift: drift(&found.config, wanted),
        }
    }
}

/// Creates the stream if it is missing; never changes an existing one.
pub(crate) async fn ensure_stream(
    jetstream: &Context,
    wanted: &stream::Config,
) -> anyhow::Result<(StreamState, Ensured)> {
    match jetstream.get_stream(&wanted.name).await {
        Ok(stream) => {
            let state = StreamState::new(stream.cached_info(), wanted);
            return Ok((state, Ensured::Found));
        }
        Err(error) => match error.kind() {
            GetStreamErrorKind::JetStream(error)
                if error.error_code() == ErrorCode::STREAM_NOT_FOUND => {}
            _ => {
                let context = format!("stream {} cannot be looked up", wanted.name);
                return Err(anyhow::Error::new(error).context(context));
            }
        },
    }
    match jetstream.create_stream(wanted.clone()).await {
        Ok(stream) => {
            info!(stream = wanted.name, "Stream created");
            let state = StreamState::new(stream.cached_info(), wanted);
            Ok((state, Ensured::Created))
        }
        Err(error) => match error.kind() {
            CreateStreamErrorKind::JetStream(error)
                if error.error_code() == ErrorCode::STORAGE_RESOURCES_EXCEEDED =>
            {
                anyhow::bail!(
                    "the NATS server has no room for stream {}, whose limit is {} bytes: raise \
                     `max_file` in its configuration above the sum of all streams, or lower \
                     GOZON_STREAM_MAX_BYTES",
                    wanted.name,
                    wanted.max_bytes
                )
            }
            _ => Err(anyhow::Error::new(error)
                .context(format!("stream {} cannot be created", wanted.name))),
        },
    }
}

#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("stream {0} does not exist yet; the service that owns it creates it")]
pub(crate) struct NoStream(pub(crate) &'static str);

/// Finds the durable consumer, or creates it if it is missing.
pub(crate) async fn ensure_consumer(
    jetstream: &Context,
    subscription: &Subscription,
    settings: &TopologySettings,
) -> anyhow::Result<(PullConsumer, Ensured)> {
    let Subscription {
        consumer, stream, ..
    } = *subscription;
    match jetstream.get_consumer_from_stream(consumer, stream).await {
        Ok(consumer) => return Ok((consumer, Ensured::Found)),
        Err(error) => match error.kind() {
            ConsumerErrorKind::JetStream(error)
                if error.error_code() == ErrorCode::CONSUMER_NOT_FOUND => {}
            ConsumerErrorKind::JetStream(error)
                if error.error_code() == ErrorCode::STREAM_NOT_FOUND =>
            {
                return Err(NoStream(stream).into());
            }
            _ => {
                let context = format!("consumer {consumer} cannot be looked up");
                return Err(anyhow::Error::new(error).context(context));
            }
        },
    }
    // Strict: if another replica has just created it with other settings, that consumer stays
    // unchanged.
    let found = tokio::time::timeout(INFO_TIMEOUT, jetstream.get_stream(stream)).await;
    let last_sequence = match found {
        Ok(Ok(stream)) => stream.cached_info().state.last_sequence,
        Ok(Err(_)) | Err(_) => {
            // A broker with the permissions of an older version does not answer this request.
            warn!(
                consumer,
                stream, "Cannot read the stream's last sequence; reading the whole stream"
            );
            0
        }
    };
    let config = subscription.config(settings, last_sequence);
    match jetstream
        .create_consumer_strict_on_stream(config, stream)
        .await
    {
        Ok(created) => {
            info!(consumer, stream, "Consumer created");
            Ok((created, Ensured::Created))
        }
        Err(error) => {
            let context = format!("consumer {consumer} cannot be created");
            Err(anyhow::Error::new(error).context(context))
        }
    }
}

/// Options that differ.
fn drift(found: &stream::Config, wanted: &stream::Config) -> Vec<String> {
    let options = |config: &stream::Config| {
        [
            ("subjects", format!("{:?}", config.subjects)),
            ("storage", format!("{:?}", config.storage)),
            ("retention", format!("{:?}", config.retention)),
            ("max_age", format!("{:?}", config.max_age)),
            ("max_bytes", config.max_bytes.to_string()),
            ("discard", format!("{:?}", config.discard)),
            ("num_replicas", config.num_replicas.to_string()),
            ("duplicate_window", format!("{:?}", config.duplicate_window)),
            ("deny_delete", config.deny_delete.to_string()),
            ("deny_purge", config.deny_purge.to_string()),
            ("allow_direct", config.allow_direct.to_string()),
            (
                "allow_atomic_publish",
                config.allow_atomic_publish.to_string(),
            ),
        ]
    };
    let pairs = options(found).into_iter().zip(options(wanted));
    pairs
        .filter(|(found, wanted)| found != wanted)
        .map(|((option, found), (_, wanted))| format!("{option} is {found}, not {wanted}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drift_names_the_options_that_differ() {
        let wanted = Stream::events("EVENTS", "test.events.>").config(&TopologySettings::default());
        assert_eq!(drift(&wanted, &wanted), Vec::<String>::new());
        let found = stream::Config {
            max_bytes: 5,
            deny_purge: false,
            ..wanted.clone()
        };
        let expected = [
            "max_bytes is 5, not 1073741824",
            "deny_purge is false, not true",
        ];
        assert_eq!(drift(&found, &wanted), expected);
    }

    #[test]
    fn each_service_has_its_subject_of_dead_letters() {
        let stream = Stream::dead_letters("LETTERS", "test.letters.>");
        assert_eq!(stream.subject_of("orders"), "test.letters.orders");
    }
}
