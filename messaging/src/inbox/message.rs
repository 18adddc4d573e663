//! Decodes messages strictly and merges repetitions within a batch.

use std::collections::HashMap;
use std::str::FromStr as _;

use async_nats::{HeaderMap, HeaderName, HeaderValue};
use shared_contracts::{Event, EventId, SPEC_VERSION, header};

use crate::inbox::table::Delivery;
use crate::subscriber::Received;

/// A message as the broker delivered it, or as a dead letter stores it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawMessage<'a> {
    pub(crate) subject: &'a str,
    pub(crate) headers: Option<&'a HeaderMap>,
    pub(crate) payload: &'a [u8],
    pub(crate) stream_sequence: i64,
    /// Delivery attempt of the broker, counted from 1.
    pub(crate) delivered: i32,
}

impl<'a> RawMessage<'a> {
    pub(crate) fn header(&self, name: &str) -> Option<&'a str> {
        text_header(self.headers, name)
    }

    pub(crate) fn event_id(&self) -> Option<EventId> {
        self.header(header::ID)?.parse().ok()
    }
}

/// A message with the result of decoding it.
#[derive(Clone, Debug)]
pub(crate) struct Incoming<'a, E> {
    pub(crate) raw: RawMessage<'a>,
    /// The event, or why the message is poison.
    pub(crate) content: Result<Received<E>, String>,
}

impl<'a, E: Event> Incoming<'a, E> {
    pub(crate) fn read(raw: RawMessage<'a>) -> Self {
        Self {
            raw,
            content: read_message(raw.headers, raw.payload),
        }
    }

    /// The same message as poison: it can never be applied.
    pub(crate) fn poisoned(&self, cause: String) -> Self {
        Self {
            raw: self.raw,
            content: Err(cause),
        }
    }

    /// Its inbox row. A message that cannot be decoded gets none: a later re-ask of it must not
    /// look like a repetition.
    pub(crate) fn delivery(&self) -> Option<Delivery> {
        let received = self.content.as_ref().ok()?;
        Some(Delivery {
            event_id: received.event_id.as_uuid(),
            stream_sequence: self.raw.stream_sequence,
            delivered: self.raw.delivered,
        })
    }
}

/// Formats headers as the tables store them: sorted `Name: value` lines.
pub(crate) fn header_lines(headers: Option<&HeaderMap>, wanted: impl Fn(&str) -> bool) -> Vec<u8> {
    let mut lines: Vec<String> = headers
        .into_iter()
        .flat_map(HeaderMap::iter)
        .filter(|(name, _)| wanted(name.as_ref()))
        .flat_map(|(name, values)| values.iter().map(move |value| format!("{name}: {value}\n")))
        .collect();
    lines.sort();
    lines.concat().into_bytes()
}

/// Parses the output of [`header_lines`].
pub(crate) fn parse_header_lines(lines: &[u8]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for line in String::from_utf8_lossy(lines).lines() {
        let Some((name, value)) = line.split_once(": ") else {
            continue;
        };
        if let (Ok(name), Ok(value)) = (HeaderName::from_str(name), HeaderValue::from_str(value)) {
            headers.append(name, value);
        }
    }
    headers
}

fn text_header<'a>(headers: Option<&'a HeaderMap>, name: &str) -> Option<&'a str> {
    Some(headers?.get(name)?.as_str())
}

/// Decodes a message strictly. The error says why the message is poison.
pub fn read_message<E: Event>(
    headers: Option<&HeaderMap>,
    payload: &[u8],
) -> Result<Received<E>, String> {
    let required =
        |name: &str| text_header(headers, name).ok_or_else(|| format!("header {name} is missing"));
    let event_id: EventId = required(header::ID)?
        .parse()
        .map_err(|_| format!("header {} is not a UUID", header::ID))?;
    let version = required(header::SPEC_VERSION)?;
    if version != SPEC_VERSION {
        return Err(format!(
            "unknown CloudEvents version {version:?}; expected {SPEC_VERSION}"
        ));
    }
    let kind = required(header::TYPE)?;
    if kind != E::TYPE {
        return Err(format!("unknown type {kind:?}; expected {}", E::TYPE));
    }
    let ask = match text_header(headers, header::ASK) {
        None => 0,
        Some(text) => text
            .parse()
            .map_err(|_| format!("header {} is not a number: {text:?}", header::ASK))?,
    };
    let event: E = serde_json::from_slice(payload)
        .map_err(|error| format!("not a valid {}: {error}", E::TYPE))?;
    let subject = required(header::SUBJECT)?;
    if subject != event.key().to_string() {
        return Err(format!(
            "header {} is {subject:?}, but the body is about {}",
            header::SUBJECT,
            event.key()
        ));
    }
    Ok(Received {
        event,
        event_id,
        ask,
        traceparent: text_header(headers, header::TRACEPARENT).map(str::to_owned),
    })
}

/// Returns one entry per event, in stream order, and for each message the index of its entry.
///
/// For several deliveries of one event, the highest ask counts. Two messages with the same id and
/// different content stay two entries, so that the handler detects the contradiction.
pub(crate) fn distinct<E: Event + Clone + PartialEq>(
    batch: &[Incoming<'_, E>],
) -> (Vec<Received<E>>, Vec<Option<usize>>) {
    let mut events: Vec<Received<E>> = Vec::with_capacity(batch.len());
    let mut by_id: HashMap<EventId, Vec<usize>> = HashMap::with_capacity(batch.len());
    let mut indexes = Vec::with_capacity(batch.len());
    for incoming in batch {
        let Ok(received) = &incoming.content else {
            indexes.push(None);
            continue;
        };
        let same_id = by_id.entry(received.event_id).or_default();
        let known = same_id
            .iter()
            .copied()
            .find(|index| events[*index].event == received.event);
        let index = known.unwrap_or_else(|| {
            events.push(received.clone());
            same_id.push(events.len() - 1);
            events.len() - 1
        });
        events[index].ask = events[index].ask.max(received.ask);
        indexes.push(Some(index));
    }
    (events, indexes)
}
