//! What is in the streams, and how far their readers are.

use std::collections::BTreeMap;

use anyhow::Context as _;
use async_nats::jetstream::consumer::{DeliverPolicy, pull};
use async_nats::jetstream::{Context, stream};
use async_nats::{HeaderMap, jetstream};
use futures_util::{StreamExt as _, TryStreamExt as _};
use serde::Serialize;
use serde_json::Value;
use time::OffsetDateTime;

/// A stream.
#[derive(Clone, Debug, Serialize)]
pub struct StreamSummary {
    /// Its name.
    pub name: String,
    /// What it stores.
    pub subjects: Vec<String>,
    /// How many messages it holds.
    pub messages: u64,
    /// How large they are together.
    pub bytes: u64,
    /// How large they may get before the oldest go.
    pub max_bytes: i64,
    /// Sequence of the oldest message; 0 if there was never one.
    pub first_sequence: u64,
    /// Sequence of the newest.
    pub last_sequence: u64,
    /// When the newest came.
    #[serde(with = "time::serde::rfc3339")]
    pub last_at: OffsetDateTime,
    /// How many consumers it has.
    pub consumers: usize,
}

/// A consumer.
#[derive(Clone, Debug, Serialize)]
pub struct ConsumerSummary {
    /// Its name.
    pub name: String,
    /// The stream it reads.
    pub stream: String,
    /// What it takes of it.
    pub subject: String,
    /// Whether it outlives the process that reads with it. Those of `gozon tail` and of the gateways' live events do not.
    pub durable: bool,
    /// Messages that were not delivered yet.
    pub lag: u64,
    /// Messages delivered and not acknowledged yet.
    pub unacked: usize,
    /// Of these, how many were delivered more than once.
    pub redelivered: usize,
    /// Everything up to here is acknowledged.
    pub acked_up_to: u64,
}

/// A message as it lies in a stream.
#[derive(Clone, Debug, Serialize)]
pub struct StoredMessage {
    /// Its place.
    pub sequence: u64,
    /// Where it was published.
    pub subject: String,
    /// When the broker stored it.
    #[serde(with = "time::serde::rfc3339")]
    pub stored_at: OffsetDateTime,
    /// Its headers.
    pub headers: BTreeMap<String, String>,
    /// Its body: JSON if it is that, else a string.
    pub body: Value,
}

/// What the broker adds when it hands out a message by its sequence.
const ADDED: [&str; 4] = [
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
            .filter(|(name, _)| !ADDED.contains(&name.as_ref()));
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

/// All streams, by name.
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

/// The newest messages of a stream, the oldest of them first; only those on `subject`, if one is given.
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
    // Backwards by sequence: the API gives the newest only, or the next forwards.
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

/// Shows what comes from now on, until `show` says false or the connection is gone for good.
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
        let message = message.context("the stream cannot be followed any more")?;
        let (sequence, stored_at) = match message.info() {
            Ok(info) => (info.stream_sequence, info.published),
            Err(error) => anyhow::bail!("a message without its place: {error}"),
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
                "there is no stream {name}, only {}",
                known.join(", ")
            );
            Err(anyhow::Error::new(error).context(format!("stream {name} cannot be looked up")))
        }
    }
}
