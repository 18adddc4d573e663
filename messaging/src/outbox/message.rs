//! Messages as they are stored in the outbox.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::{Serialize, Serializer};
use serde_json::Value as Json;
use shared_contracts::{Event, EventId, header, timestamp};
use time::OffsetDateTime;

/// Number of headers of a first request with a trace context.
const HEADERS_USUAL: usize = 6;

/// An event ready to be enqueued.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    pub(crate) event_id: EventId,
    pub(crate) n: i32,
    pub(crate) subject: String,
    pub(crate) headers: Headers,
    pub(crate) payload: String,
    pub(crate) is_urgent: bool,
}

impl Message {
    /// Builds a message for the first publication of an event. `traceparent` links it to the
    /// request or message that caused it.
    pub fn new<E: Event>(
        event_id: EventId,
        event: &E,
        at: OffsetDateTime,
        traceparent: Option<&str>,
    ) -> Self {
        Self::again(event_id, 0, event, at, traceparent)
    }

    /// Builds a message for re-ask number `ask` of an event. It has its own message id, so that the
    /// broker does not drop it as a duplicate, and the header `Gozon-Ask`.
    pub fn again<E: Event>(
        event_id: EventId,
        ask: u32,
        event: &E,
        at: OffsetDateTime,
        traceparent: Option<&str>,
    ) -> Self {
        let mut headers = Headers::new(E::TYPE, E::SOURCE, E::STREAM, at);
        headers.set(header::SUBJECT, event.key().to_string());
        if ask > 0 {
            headers.set(header::ASK, ask.to_string());
        }
        if let Some(traceparent) = traceparent {
            headers.set(header::TRACEPARENT, traceparent);
        }
        Self {
            event_id,
            n: i32::try_from(ask).unwrap_or(i32::MAX),
            subject: E::SUBJECT.to_owned(),
            headers,
            payload: serde_json::to_string(event)
                .expect("an event is plain data and always serializes"),
            is_urgent: true,
        }
    }

    /// A message that nobody waits for. The relay publishes it together with others, if some come
    /// soon.
    #[must_use]
    pub fn not_urgent(self) -> Self {
        Self {
            is_urgent: false,
            ..self
        }
    }

    /// Builds a message that is not an [`Event`]: a copy of a dead letter, for tools.
    pub(crate) fn notice(
        subject: String,
        stream: &str,
        kind: &str,
        source: &str,
        at: OffsetDateTime,
        body: &Json,
    ) -> Self {
        Self {
            event_id: EventId::mint(),
            n: 0,
            subject,
            headers: Headers::new(kind, source, stream, at),
            payload: body.to_string(),
            is_urgent: false,
        }
    }
}

/// The headers of a message. The outbox stores them as a JSON object of strings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Headers(Vec<(Cow<'static, str>, String)>);

impl Headers {
    fn new(kind: &str, source: &str, stream: &str, at: OffsetDateTime) -> Self {
        let mut headers = Self(Vec::with_capacity(HEADERS_USUAL));
        headers.set(header::TYPE, kind);
        headers.set(header::SOURCE, source);
        headers.set(header::TIME, timestamp::format(at));
        headers.set(header::EXPECTED_STREAM, stream);
        headers
    }

    fn set(&mut self, name: &'static str, value: impl Into<String>) {
        self.0.push((name.into(), value.into()));
    }

    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        let mut headers = self.0.iter();
        let (_, value) = headers.find(|(known, _)| known == name)?;
        Some(value)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (&**name, &**value))
    }

    /// Upper bound of the bytes in a message.
    pub(crate) fn len(&self) -> usize {
        let lengths = self
            .iter()
            .map(|(name, value)| name.len() + value.len() + 4);
        lengths.sum()
    }

    pub(crate) fn to_json(&self) -> String {
        serde_json::to_string(self).expect("strings always serialize")
    }

    pub(crate) fn from_json(text: &str) -> serde_json::Result<Self> {
        let headers: BTreeMap<String, String> = serde_json::from_str(text)?;
        let headers = headers.into_iter();
        Ok(Self(
            headers.map(|(name, value)| (name.into(), value)).collect(),
        ))
    }
}

impl Serialize for Headers {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter())
    }
}
