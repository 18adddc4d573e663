//! Streams, their consumers and their messages.

use std::collections::BTreeMap;

use anyhow::Context as _;
use async_nats::jetstream::consumer::{DeliverPolicy, pull};
use async_nats::jetstream::{Context, stream};
use async_nats::{HeaderMap, jetstream};
use futures_util::{StreamExt as _, TryStreamExt as _};
use serde::Serialize;
use serde_json::Value;
use time::OffsetDateTime;

#[derive(Clone, Debug, Serialize)]
pub struct StreamSummary {
    pub name: String,
    pub subjects: Vec<String>,
    /// Number of stored messages.
    pub messages: u64,
    pub bytes: u64,
    /// The broker deletes the oldest messages beyond this size.
    pub max_bytes: i64,
    /// Sequence of the oldest message; 0 if the stream never had one.
    pub first_sequence: u64,
    pub last_sequence: u64,
    /// When the newest message was stored.
    #[serde(with = "time::serde::rfc3339")]
    pub last_at: OffsetDateTime,
    pub consumers: usize,
}

#[derive(Clone, Debug, Serialize)]
pub struct ConsumerSummary {
    pub name: String,
    pub stream: String,
    /// Subject filter; empty for all subjects.
    pub subject: String,
    /// False for `gozon tail` and the gateways' live events: these end with their process.
    pub durable: bool,
    /// Messages not delivered yet.
    pub lag: u64,
    /// Messages delivered but not acknowledged.
    pub unacked: usize,
    /// Unacknowledged messages that were delivered more than once.
    pub redelivered: usize,
    /// All messages up to this sequence are acknowledged.
    pub acked_up_to: u64,
}

#[derive(Clone, Debug, Serialize)]
pub struct StoredMessage {
    pub sequence: u64,
    pub subject: String,
    #[serde(with = "time::serde::rfc3339")]
    pub stored_at: OffsetDateTime,
    pub headers: BTreeMap<String, String>,
    /// A string if the payload is not JSON.
    pub body: Value,
}

/// Headers that the broker adds to the answer when a message is read by its sequence.
const BROKER_HEADERS: [&str; 4] = [
    "Nats-Stream",
    "Nats-Subject",
    "Nats-Sequence",
    "Nats-Time-Stamp",
];

impl StoredMessage {
    fn new(
        sequence: u64,
        subject: &str,
        stored_at: OffsetDateTime,
        headers: Option<&HeaderMap>,
        payload: &[u8],
    ) -> Self {
        let headers = headers
            .into_iter()
            .flat_map(HeaderMap::iter)
            .filter(|(name, _)| !BROKER_HEADERS.contains(&name.as_ref()));
        let headers = headers.flat_map(|(name, values)| {
            values
                .iter()
                .map(move |value| (name.to_string(), value.to_string()))
        });
        let body = serde_json::from_slice(payload)
            .unwrap_or_else(|_| Value::String(String::from_utf8_lossy(payload).into_owned()));
        Self {
            sequence,
            subject: subject.to_owned(),
            stored_at,
            headers: headers.collect(),
            body,
        }
    }
}

/// All streams, sorted by name.
pub async fn list(jetstream: &Context) -> anyhow::Result<Vec<StreamSummary>> {
    let found: Vec<stream::Info> = jetstream
        .streams()
        .try_collect()
        .await
        .context("the streams cannot be listed")?;
    let mut summaries: Vec<StreamSummary> = found
        .into_iter()
        .map(|info| StreamSummary {
            name: info.config.name,
            subjects: info.config.subjects,
            messages: info.state.messages,
            bytes: info.state.bytes,
            max_bytes: info.config.max_bytes,
            first_sequence: info.state.first_sequence,
            last_sequence: info.state.last_sequence,
            last_at: info.state.last_timestamp,
            consumers: info.state.consumer_count,
        })
        .collect();
    summaries.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(summaries)
}

/// The consumers of one stream, or of all.
pub async fn consumers(
    jetstream: &Context,
    stream: Option<&str>,
) -> anyhow::Result<Vec<ConsumerSummary>> {
    let names = match stream {
        Some(name) => vec![name.to_owned()],
        None => list(jetstream)
            .await?
            .into_iter()
            .map(|stream| stream.name)
            .collect(),
    };
    let mut summaries = Vec::new();
    for name in names {
        let stream = find(jetstream, &name).await?;
        let found: Vec<jetstream::consumer::Info> = stream
            .consumers()
            .try_collect()
            .await
            .context("consumers cannot be listed")?;
        summaries.extend(found.into_iter().map(|info| ConsumerSummary {
            name: info.name,
            stream: info.stream_name,
            subject: info.config.filter_subject,
            durable: info.config.durable_name.is_some(),
            lag: info.num_pending,
            unacked: info.num_ack_pending,
            redelivered: info.num_redelivered,
            acked_up_to: info.ack_floor.stream_sequence,
        }));
    }
    Ok(summaries)
}

/// The newest `count` messages of a stream, oldest first; with `subject`, only those on it.
pub async fn peek(
    jetstream: &Context,
    stream: &str,
    count: u64,
    subject: Option<&str>,
) -> anyhow::Result<Vec<StoredMessage>> {
    let stream = find(jetstream, stream).await?;
    let state = &stream.cached_info().state;
    let mut messages = Vec::new();
    let mut sequence = state.last_sequence;
    // Backwards by sequence: the API can only return the newest message or search forwards.
    while sequence >= state.first_sequence.max(1) && (messages.len() as u64) < count {
        match stream.direct_get(sequence).await {
            Ok(message) if subject.is_none_or(|wanted| message.subject.as_str() == wanted) => {
                let message = StoredMessage::new(
                    sequence,
                    &message.subject,
                    message.time,
                    Some(&message.headers),
                    &message.payload,
                );
                messages.push(message);
            }
            Ok(_) => {}
            Err(error) if error.kind() == stream::DirectGetErrorKind::NotFound => {}
            Err(error) => {
                return Err(
                    anyhow::Error::new(error).context(format!("message {sequence} cannot be read"))
                );
            }
        }
        sequence -= 1;
    }
    messages.reverse();
    Ok(messages)
}

/// Calls `show` for each new message, until it returns false or the connection is closed for good.
pub async fn tail(
    jetstream: &Context,
    stream: &str,
    subject: Option<&str>,
    mut show: impl FnMut(StoredMessage) -> bool,
) -> anyhow::Result<()> {
    let stream = find(jetstream, stream).await?;
    let config = pull::OrderedConfig {
        deliver_policy: DeliverPolicy::New,
        filter_subject: subject.unwrap_or_default().to_owned(),
        ..Default::default()
    };
    let consumer = stream
        .create_consumer(config)
        .await
        .context("the stream cannot be followed")?;
    let mut messages = consumer
        .messages()
        .await
        .context("the stream cannot be followed")?;
    while let Some(message) = messages.next().await {
        let message = message.context("following the stream failed")?;
        let (sequence, stored_at) = match message.info() {
            Ok(info) => (info.stream_sequence, info.published),
            Err(error) => anyhow::bail!("a message has no stream sequence: {error}"),
        };
        if !show(StoredMessage::new(
            sequence,
            &message.subject,
            stored_at,
            message.headers.as_ref(),
            &message.payload,
        )) {
            break;
        }
    }
    Ok(())
}

async fn find(jetstream: &Context, name: &str) -> anyhow::Result<stream::Stream> {
    match jetstream.get_stream(name).await {
        Ok(stream) => Ok(stream),
        Err(error) => {
            let known: Vec<String> = list(jetstream)
                .await?
                .into_iter()
                .map(|stream| stream.name)
                .collect();
            anyhow::ensure!(
                known.iter().any(|one| one == name),
                "there is no stream {name}; the streams are {}",
                known.join(", ")
            );
            Err(anyhow::Error::new(error)
                .context(format!("the state of stream {name} cannot be read")))
        }
    }
}
