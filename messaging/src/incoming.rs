//! Reading messages: strictly, and each fact of a batch once.

use std::collections::{HashMap, HashSet};

use async_nats::HeaderMap;
use async_nats::jetstream::Message;
use uuid::Uuid;

use shared_contracts::{Event, EventId, OrderId, SPEC_VERSION, header};

use crate::dead_letter::{DeadMessage, Verdict};
use crate::inbox::Delivery;

/// A message that was understood.
#[derive(Clone, Debug)]
pub struct Received<E> {
    /// What it says.
    pub event: E,
    /// Which fact it is; the same over every re-send.
    pub event_id: EventId,
    /// 0 for the first request, n for the n-th re-ask.
    pub ask: u32,
    /// Whether this consumer's inbox had not seen the fact. A hint: effects are guarded by business rows.
    pub first: bool,
    /// W3C trace context of whoever made the fact.
    pub traceparent: Option<String>,
}

/// A message with what became of reading it.
#[derive(Clone)]
pub(crate) struct Incoming<'a, E> {
    pub(crate) message: &'a Message,
    pub(crate) stream_sequence: u64,
    delivered: i64,
    event_id: Option<Uuid>,
    /// Named by a header, so that the order of a message that cannot be read is known too.
    order_id: Option<Uuid>,
    content: Result<Received<E>, Verdict>,
}

impl<'a, E: Event + Clone + PartialEq> Incoming<'a, E> {
    pub(crate) fn decode(message: &'a Message) -> Self {
        let (stream_sequence, delivered) = message
            .info()
            .map_or((0, 0), |info| (info.stream_sequence, info.delivered));
        let event_id = text_header(message.headers.as_ref(), header::ID)
            .and_then(|id| id.parse::<EventId>().ok());
        let order_id = text_header(message.headers.as_ref(), header::SUBJECT)
            .and_then(|id| id.parse::<OrderId>().ok());
        let content = read(message.headers.as_ref(), &message.payload).map_err(Verdict::Poison);
        Self {
            message,
            stream_sequence,
            delivered,
            event_id: event_id.map(EventId::as_uuid),
            order_id: order_id.map(OrderId::as_uuid),
            content,
        }
    }

    /// The same message, found to be one that can never be applied.
    pub(crate) fn poisoned(&self, cause: String) -> Self {
        Self {
            content: Err(Verdict::Poison(cause)),
            ..self.clone()
        }
    }

    /// Its inbox row. A message that cannot be read gets none: the re-ask that heals it must not look repeated.
    pub(crate) fn delivery(&self) -> Option<Delivery> {
        let received = self.content.as_ref().ok()?;
        Some(Delivery {
            event_id: received.event_id.as_uuid(),
            stream_sequence: i64::try_from(self.stream_sequence).unwrap_or(i64::MAX),
            delivered: i32::try_from(self.delivered).unwrap_or(i32::MAX),
        })
    }

    pub(crate) fn dead(&self, quarantined: Option<&String>) -> Option<DeadMessage<'a>> {
        let (verdict, order_id) = match &self.content {
            Err(verdict) => (verdict.clone(), self.order_id),
            Ok(received) => (
                Verdict::Quarantine(quarantined?.clone()),
                Some(received.event.order_id().as_uuid()),
            ),
        };
        Some(DeadMessage {
            verdict,
            message: &self.message.message,
            event_id: self.event_id,
            order_id,
            stream_sequence: i64::try_from(self.stream_sequence).unwrap_or(i64::MAX),
            delivered: i32::try_from(self.delivered).unwrap_or(i32::MAX),
        })
    }
}

fn text_header<'a>(headers: Option<&'a HeaderMap>, name: &str) -> Option<&'a str> {
    Some(headers?.get(name)?.as_str())
}

/// Reads a message strictly; says in words what is wrong with it. What this refuses is poison.
pub fn read<E: Event>(headers: Option<&HeaderMap>, payload: &[u8]) -> Result<Received<E>, String> {
    let required =
        |name: &str| text_header(headers, name).ok_or_else(|| format!("header {name} is missing"));
    let event_id: EventId = required(header::ID)?
        .parse()
        .map_err(|_| format!("header {} is no UUID", header::ID))?;
    let version = required(header::SPEC_VERSION)?;
    if version != SPEC_VERSION {
        return Err(format!(
            "CloudEvents version {version:?} is not known, only {SPEC_VERSION}"
        ));
    }
    let kind = required(header::TYPE)?;
    if kind != E::TYPE {
        return Err(format!("type {kind:?} is not known here, only {}", E::TYPE));
    }
    let ask = match text_header(headers, header::ASK) {
        None => 0,
        Some(text) => text
            .parse()
            .map_err(|_| format!("header {} is no number: {text:?}", header::ASK))?,
    };
    let event: E = serde_json::from_slice(payload)
        .map_err(|error| format!("the body is no {}: {error}", E::TYPE))?;
    let order_id = required(header::SUBJECT)?;
    if order_id != event.order_id().to_string() {
        return Err(format!(
            "header {} names order {order_id:?}, the body order {}",
            header::SUBJECT,
            event.order_id()
        ));
    }
    let traceparent = text_header(headers, header::TRACEPARENT).map(str::to_owned);
    Ok(Received {
        event,
        event_id,
        ask,
        first: false,
        traceparent,
    })
}

/// One entry per event, in stream order, and for each message its place among them. Of several deliveries of one
/// event, the highest ask counts. Two messages with one id and other content stay two entries: the handler must see
/// that they contradict each other.
pub(crate) fn distinct<E: Event + Clone + PartialEq>(
    batch: &[Incoming<'_, E>],
    first: &HashSet<Uuid>,
) -> (Vec<Received<E>>, Vec<Option<usize>>) {
    let mut events: Vec<Received<E>> = Vec::with_capacity(batch.len());
    let mut by_id: HashMap<EventId, Vec<usize>> = HashMap::with_capacity(batch.len());
    let mut places = Vec::with_capacity(batch.len());
    for incoming in batch {
        let Ok(received) = &incoming.content else {
            places.push(None);
            continue;
        };
        let same_id = by_id.entry(received.event_id).or_default();
        let place = match same_id
            .iter()
            .copied()
            .find(|place| events[*place].event == received.event)
        {
            Some(place) => {
                events[place].ask = events[place].ask.max(received.ask);
                place
            }
            None => {
                events.push(Received {
                    first: first.contains(&received.event_id.as_uuid()),
                    ..received.clone()
                });
                same_id.push(events.len() - 1);
                events.len() - 1
            }
        };
        places.push(Some(place));
    }
    (events, places)
}
