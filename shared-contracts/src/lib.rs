//! What the services say to each other: events, ids and money. Pure data, no I/O.
//!
//! | event | subject | stream | from -> to |
//! |---|---|---|---|
//! | [`OrderPlaced`] | `gozon.orders.placed` | ORDERS | orders -> payments, gateway |
//! | [`PaymentSettled`] | `gozon.payments.settled` | PAYMENTS | payments -> orders |
//! | [`OrderFinished`] | `gozon.orders.finished` | ORDERS | orders -> gateway, anyone |
//! | [`OrderCancelled`] | `gozon.orders.cancelled` | ORDERS | orders -> gateway, anyone |
//!
//! Events travel as CloudEvents in binary mode: the attributes are message headers (see [`header`]), the body is
//! plain JSON. Readers tolerate unknown fields; a change that an old reader would misunderstand gets a new
//! [`Event::TYPE`].

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

/// Stream that holds what `orders` says.
pub const ORDERS_STREAM: &str = "ORDERS";
/// Stream that holds what `payments` says.
pub const PAYMENTS_STREAM: &str = "PAYMENTS";
/// Stream of copies of dead letters, for tools; the table in the database is the truth.
pub const DLQ_STREAM: &str = "DLQ";

/// A fact that one service publishes for others.
pub trait Event: Serialize + DeserializeOwned + Send + Sync + 'static {
    /// Subject it is published on.
    const SUBJECT: &'static str;
    /// Stream that stores the subject.
    const STREAM: &'static str;
    /// CloudEvents type, with the version of the body's shape.
    const TYPE: &'static str;
    /// CloudEvents source: the service that says it.
    const SOURCE: &'static str;

    /// What the event belongs to, for example an order (CloudEvents `subject`). Dead letters and
    /// timelines are found by it.
    fn key(&self) -> Uuid;

    /// Which part of that it is about, for example a refund of the order.
    fn about(&self) -> Option<Uuid> {
        None
    }
}

/// Names of the message headers.
pub mod header {
    /// CloudEvents version, always [`SPEC_VERSION`](super::SPEC_VERSION).
    pub const SPEC_VERSION: &str = "ce-specversion";
    /// Event id: minted once, the same over every re-send. What readers recognise a repetition by.
    pub const ID: &str = "ce-id";
    /// Event type with its version.
    pub const TYPE: &str = "ce-type";
    /// Service that says it.
    pub const SOURCE: &str = "ce-source";
    /// When the fact was made, RFC 3339.
    pub const TIME: &str = "ce-time";
    /// Order it is about.
    pub const SUBJECT: &str = "ce-subject";
    /// Which re-ask this is (1, 2, ...); absent on the first request.
    pub const ASK: &str = "Gozon-Ask";
    /// W3C trace context.
    pub const TRACEPARENT: &str = "traceparent";
    /// The broker's de-duplication id. Only saves work; correctness never rests on it.
    pub const MESSAGE_ID: &str = "Nats-Msg-Id";
    /// The broker refuses the message if its subject is stored by another stream.
    pub const EXPECTED_STREAM: &str = "Nats-Expected-Stream";
}

/// The CloudEvents version that is spoken.
pub const SPEC_VERSION: &str = "1.0";
