//! Messages as they are stored in the outbox.

use serde_json::{Map, Value as Json};
use shared_contracts::{Event, EventId, header, timestamp};
use time::OffsetDateTime;

/// An event ready to be enqueued.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    pub(crate) event_id: EventId,
    pub(crate) n: i32,
    pub(crate) subject: String,
    pub(crate) headers: String,
    pub(crate) payload: String,
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
            headers: headers.into_json(),
            payload: serde_json::to_string(event)
                .expect("an event is plain data and always serializes"),
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
            headers: Headers::new(kind, source, stream, at).into_json(),
            payload: body.to_string(),
        }
    }
}

struct Headers(Map<String, Json>);

impl Headers {
    fn new(kind: &str, source: &str, stream: &str, at: OffsetDateTime) -> Self {
        let mut headers = Self(Map::new());
        headers.set(header::TYPE, kind);
        headers.set(header::SOURCE, source);
        headers.set(header::TIME, timestamp::format(at));
        headers.set(header::EXPECTED_STREAM, stream);
        headers
    }

    fn set(&mut self, name: &str, value: impl Into<String>) {
        self.0.insert(name.to_owned(), Json::String(value.into()));
    }

    fn into_json(self) -> String {
        Json::Object(self.0).to_string()
    }
}
