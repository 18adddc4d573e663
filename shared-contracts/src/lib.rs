//! The contract between the services: events, ids and money. Pure data, no I/O.
//!
//! | event | subject | stream | from -> to |
//! |---|---|---|---|
//! | [`OrderPlaced`] | `gozon.orders.placed` | ORDERS | orders -> payments, gateway |
//! | [`PaymentSettled`] | `gozon.payments.settled` | PAYMENTS | payments -> orders |
//! | [`OrderFinished`] | `gozon.orders.finished` | ORDERS | orders -> gateway, anyone |
//! | [`OrderCancelled`] | `gozon.orders.cancelled` | ORDERS | orders -> gateway, anyone |
//!
//! Events travel as CloudEvents in binary mode: the attributes are message headers (see
//! [`header`]), the body is plain JSON. Consumers tolerate unknown fields. A change that old
//! consumers would misunderstand needs a new [`Event::TYPE`].

mod id;
mod money;
mod order;
mod payment;
pub mod timeline;
pub mod timestamp;

pub use id::{EventId, InvalidUserId, OrderId, UserId};
pub use money::{Amount, BALANCE_MAX, InvalidAmount};
pub use order::{OrderCancelled, OrderFinished, OrderPlaced};
pub use payment::{DeclineReason, PaymentOutcome, PaymentSettled};

use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

/// Stream of the events of `orders`.
pub const ORDERS_STREAM: &str = "ORDERS";
/// Stream of the events of `payments`.
pub const PAYMENTS_STREAM: &str = "PAYMENTS";
/// Stream of copies of dead letters, for tools; the table in the database is authoritative.
pub const DLQ_STREAM: &str = "DLQ";

/// A fact that a service publishes for others.
pub trait Event: Serialize + DeserializeOwned + Send + Sync + 'static {
    /// The subject it is published on.
    const SUBJECT: &'static str;
    /// The stream that stores the subject.
    const STREAM: &'static str;
    /// CloudEvents type, with the version of the body.
    const TYPE: &'static str;
    /// CloudEvents source: the publishing service.
    const SOURCE: &'static str;

    /// The id of the entity that the event belongs to, for example of an order (CloudEvents
    /// `subject`). Dead letters and timelines are looked up by it.
    fn key(&self) -> Uuid;

    /// The id of the part that the event is about, for example of a refund of the order.
    fn about(&self) -> Option<Uuid> {
        None
    }
}

/// Names of the message headers.
pub mod header {
    /// CloudEvents version, always [`SPEC_VERSION`](super::SPEC_VERSION).
    pub const SPEC_VERSION: &str = "ce-specversion";
    /// Event id: created once and the same each time the event is published. Consumers recognise
    /// duplicates by it.
    pub const ID: &str = "ce-id";
    /// Event type with its version.
    pub const TYPE: &str = "ce-type";
    /// The publishing service.
    pub const SOURCE: &str = "ce-source";
    /// When the event was created, in RFC 3339 format.
    pub const TIME: &str = "ce-time";
    /// Id of the entity that the event belongs to: see [`Event::key`](super::Event::key).
    pub const SUBJECT: &str = "ce-subject";
    /// Number of the re-ask (1, 2, ...); absent on the first request.
    pub const ASK: &str = "Gozon-Ask";
    /// W3C trace context.
    pub const TRACEPARENT: &str = "traceparent";
    /// The broker's de-duplication id. It only saves work; correctness does not depend on it.
    pub const MESSAGE_ID: &str = "Nats-Msg-Id";
    /// The broker rejects the message if another stream stores its subject.
    pub const EXPECTED_STREAM: &str = "Nats-Expected-Stream";
}

/// Version of the CloudEvents specification.
pub const SPEC_VERSION: &str = "1.0";
