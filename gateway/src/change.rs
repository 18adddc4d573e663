//! Changes of an order's status, decoded from messages of the stream ORDERS, and their positions.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::str::FromStr;

use async_nats::HeaderMap;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use shared_contracts::{
    DeclineReason, Event, OrderCancelled, OrderFinished, OrderId, OrderPlaced, UserId, header,
    timestamp,
};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use utoipa::ToSchema;
use uuid::Uuid;

/// An OrderPlaced that was stored in the stream this long after its creation is an old event that
/// was published again. It is not a change.
const PLACED_AGE_MAX: time::Duration = time::Duration::hours(1);

/// A position in the stream: a sequence and the event that is stored there. The sequence alone is
/// ambiguous, because sequences start again when a stream is recreated. As text it is
/// `<stream sequence>.<event id>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Position {
    pub(crate) sequence: u64,
    /// Absent if the stream has no event there, because it is empty.
    pub(crate) event_id: Option<Uuid>,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.event_id {
            Some(event_id) => write!(f, "{}.{event_id}", self.sequence),
            None => write!(f, "{}.-", self.sequence),
        }
    }
}

impl FromStr for Position {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const RULE: &str = "must be the id of an event of this stream";
        let (sequence, event_id) = text.split_once('.').ok_or(RULE)?;
        let event_id = match event_id {
            "-" => None,
            id => Some(id.parse().map_err(|_| RULE)?),
        };
        Ok(Self {
            sequence: sequence.parse().map_err(|_| RULE)?,
            event_id,
        })
    }
}

pub(crate) fn position(sequence: u64, headers: Option<&HeaderMap>) -> Position {
    Position {
        sequence,
        event_id: text_header(headers, header::ID).and_then(|id| id.parse().ok()),
    }
}

/// A change of an order: its status, and when it changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = OrderChange, example = json!({"order_id": "01933f3c-7d5a-7b60-9d6f-3f0b4b1f2a11", "user_id": "alice", "amount": 1299, "status": "FINISHED", "reason": null, "at": "2026-11-21T10:00:00.123456Z"}))]
pub(crate) struct Change {
    #[schema(value_type = Uuid)]
    pub(crate) order_id: OrderId,
    pub(crate) user_id: UserId,
    /// Minor units.
    pub(crate) amount: i64,
    pub(crate) status: Status,
    /// Why it was cancelled; null if it was not.
    #[schema(required = true)]
    pub(crate) reason: Option<DeclineReason>,
    #[serde(serialize_with = "timestamp::serialize")]
    #[schema(value_type = String, format = DateTime)]
    pub(crate) at: OffsetDateTime,
}

/// NEW until the payment is decided; then FINISHED (debited once) or CANCELLED (never debited), for
/// ever.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "UPPERCASE")]
#[schema(as = OrderStatus)]
pub(crate) enum Status {
    New,
    Finished,
    Cancelled,
}

/// The order and user of a message: enough to find the listeners for it.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Subject {
    pub(crate) order_id: OrderId,
    pub(crate) user_id: UserId,
}

impl Subject {
    pub(crate) fn read(payload: &[u8]) -> Option<Self> {
        serde_json::from_slice(payload).ok()
    }
}

impl Status {
    /// The order status that a message type stands for. `None` for other types.
    pub(crate) fn of(headers: Option<&HeaderMap>) -> Option<Self> {
        match text_header(headers, header::TYPE)? {
            OrderPlaced::TYPE => Some(Self::New),
            OrderFinished::TYPE => Some(Self::Finished),
            OrderCancelled::TYPE => Some(Self::Cancelled),
            _ => None,
        }
    }

    pub(crate) fn is_final(self) -> bool {
        self != Self::New
    }
}

impl Change {
    /// Decodes the change from a message. `None` for re-asks, old events and unknown types.
    pub(crate) fn read(
        headers: Option<&HeaderMap>,
        payload: &[u8],
        stored_at: OffsetDateTime,
    ) -> Option<Self> {
        let at = OffsetDateTime::parse(text_header(headers, header::TIME)?, &Rfc3339).ok()?;
        let status = Status::of(headers)?;
        let (order_id, user_id, amount, reason) = match status {
            Status::New => {
                if text_header(headers, header::ASK).is_some() || stored_at - at > PLACED_AGE_MAX {
                    return None;
                }
                let placed: OrderPlaced = serde_json::from_slice(payload).ok()?;
                (placed.order_id, placed.user_id, placed.amount, None)
            }
            Status::Finished => {
                let finished: OrderFinished = serde_json::from_slice(payload).ok()?;
                (finished.order_id, finished.user_id, finished.amount, None)
            }
            Status::Cancelled => {
                let cancelled: OrderCancelled = serde_json::from_slice(payload).ok()?;
                let reason = Some(cancelled.reason);
                (
                    cancelled.order_id,
                    cancelled.user_id,
                    cancelled.amount,
                    reason,
                )
            }
        };
        Some(Self {
            order_id,
            user_id,
            amount: amount.minor_units(),
            status,
            reason,
            at,
        })
    }

    /// From the JSON that the service orders returns for an order.
    pub(crate) fn of_order(order: &Value) -> Option<Self> {
        let text = |name: &str| order.get(name)?.as_str();
        Some(Self {
            order_id: text("id")?.parse().ok()?,
            user_id: UserId::parse(text("user_id")?).ok()?,
            amount: order.get("amount")?.as_i64()?,
            status: Status::deserialize(order.get("status")?).ok()?,
            reason: text("reason").and_then(DeclineReason::parse),
            at: OffsetDateTime::parse(text("updated_at")?, &Rfc3339).ok()?,
        })
    }

    pub(crate) fn is_final(&self) -> bool {
        self.status.is_final()
    }
}

fn text_header<'a>(headers: Option<&'a HeaderMap>, name: &str) -> Option<&'a str> {
    Some(headers?.get(name)?.as_str())
}

/// Final orders, each with the sequence of its final event. A later event about such an order is a
/// repetition, which must not set its status back.
#[derive(Debug, Default)]
pub(crate) struct FinalOrders {
    at: HashMap<Uuid, u64>,
    oldest_first: VecDeque<Uuid>,
}

impl FinalOrders {
    /// Number of orders to remember, about 60 bytes each. A replay never goes back this far.
    const MAX: usize = 100_000;

    /// Whether the order became final before this sequence.
    pub(crate) fn was_final_before(&self, order_id: OrderId, sequence: u64) -> bool {
        self.at
            .get(&order_id.as_uuid())
            .is_some_and(|end| *end < sequence)
    }

    /// Records that an order became final. Later records of the same order are ignored.
    pub(crate) fn record(&mut self, order_id: OrderId, sequence: u64) {
        if self.at.contains_key(&order_id.as_uuid()) {
            return;
        }
        self.at.insert(order_id.as_uuid(), sequence);
        self.oldest_first.push_back(order_id.as_uuid());
        if self.oldest_first.len() > Self::MAX
            && let Some(oldest) = self.oldest_first.pop_front()
        {
            self.at.remove(&oldest);
        }
    }

    /// For a recreated stream: all known orders became final before its first event.
    pub(crate) fn move_all_to_start(&mut self) {
        self.at.values_mut().for_each(|end| *end = 0);
    }
}

/// A change and its position in the stream.
#[derive(Debug)]
pub(crate) struct StoredChange {
    pub(crate) position: Position,
    pub(crate) change: Change,
    pub(crate) json: String,
}

impl StoredChange {
    pub(crate) fn new(position: Position, change: Change) -> Self {
        let json = serde_json::to_string(&change).expect("a change is plain data");
        Self {
            position,
            change,
            json,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(kind: &str, at: &str, ask: Option<&str>) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(header::TYPE, kind);
        headers.insert(header::TIME, at);
        if let Some(ask) = ask {
            headers.insert(header::ASK, ask);
        }
        headers
    }

    #[test]
    fn a_position_is_written_and_read() {
        for text in ["7.01933f3c-7d5a-7b60-9d6f-3f0b4b1f2a11", "0.-"] {
            assert_eq!(text.parse::<Position>().unwrap().to_string(), text);
        }
        for bad in ["", "7", "7.", "7.x", "x.-", "-1.-", "7.8.9"] {
            assert!(bad.parse::<Position>().is_err(), "{bad}");
        }
    }

    #[test]
    fn only_a_message_that_changes_a_status_is_a_change() {
        let body = br#"{"order_id":"01933f3c-7d5a-7b60-9d6f-3f0b4b1f2a11","user_id":"alice","amount":5,"reason":"no_account"}"#;
        let stored_at = OffsetDateTime::parse("2026-11-21T10:00:05Z", &Rfc3339).unwrap();
        let read = |headers: HeaderMap| {
            Change::read(Some(&headers), body, stored_at).map(|change| change.status)
        };
        let at = "2026-11-21T10:00:00Z";
        assert_eq!(
            read(headers(OrderPlaced::TYPE, at, None)),
            Some(Status::New)
        );
        assert_eq!(
            read(headers(OrderFinished::TYPE, at, None)),
            Some(Status::Finished)
        );
        assert_eq!(
            read(headers(OrderCancelled::TYPE, at, None)),
            Some(Status::Cancelled)
        );
        assert_eq!(
            read(headers(OrderPlaced::TYPE, at, Some("1"))),
            None,
            "a re-ask is not a change"
        );
        assert_eq!(
            read(headers(OrderPlaced::TYPE, "2026-11-21T08:00:00Z", None)),
            None,
            "an old event that was published again"
        );
        assert_eq!(
            read(headers(OrderFinished::TYPE, "2026-11-21T08:00:00Z", None)),
            Some(Status::Finished)
        );
        assert_eq!(read(headers("gozon.order.placed.v2", at, None)), None);
        assert_eq!(
            Change::read(Some(&headers(OrderPlaced::TYPE, at, None)), b"{", stored_at),
            None
        );
    }

    #[test]
    fn an_event_after_the_final_event_is_a_repetition() {
        let (order, mut final_orders) = (OrderId::mint(), FinalOrders::default());
        final_orders.record(order, 5);
        final_orders.record(order, 9);
        assert!(
            !final_orders.was_final_before(order, 4)
                && !final_orders.was_final_before(order, 5)
                && final_orders.was_final_before(order, 6)
        );
        final_orders.move_all_to_start();
        assert!(final_orders.was_final_before(order, 1));
        for _ in 0..FinalOrders::MAX {
            final_orders.record(OrderId::mint(), 10);
        }
        assert!(
            !final_orders.was_final_before(order, 1),
            "the oldest is forgotten"
        );
        assert_eq!(final_orders.at.len(), FinalOrders::MAX);
    }
}
