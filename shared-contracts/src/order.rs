//! What `orders` says.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{Amount, DeclineReason, Event, ORDERS_STREAM, OrderId, UserId};

/// An order was accepted and waits for its payment. `payments` answers with
/// [`PaymentSettled`](crate::PaymentSettled).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct OrderPlaced {
    /// The order.
    pub order_id: OrderId,
    /// Who pays.
    pub user_id: UserId,
    /// What it costs.
    pub amount: Amount,
}

/// An order was paid and is final.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct OrderFinished {
    /// The order.
    pub order_id: OrderId,
    /// Who paid.
    pub user_id: UserId,
    /// What was debited.
    pub amount: Amount,
}

/// An order was not paid and is final.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct OrderCancelled {
    /// The order.
    pub order_id: OrderId,
    /// Whose order.
    pub user_id: UserId,
    /// What it would have cost.
    pub amount: Amount,
    /// Why it was not paid.
    pub reason: DeclineReason,
}

impl Event for OrderPlaced {
    const SUBJECT: &'static str = "gozon.orders.placed";
    const STREAM: &'static str = ORDERS_STREAM;
    const TYPE: &'static str = "gozon.order.placed.v1";
    const SOURCE: &'static str = "orders";

    fn key(&self) -> Uuid {
        self.order_id.as_uuid()
    }
}

impl Event for OrderFinished {
    const SUBJECT: &'static str = "gozon.orders.finished";
    const STREAM: &'static str = ORDERS_STREAM;
    const TYPE: &'static str = "gozon.order.finished.v1";
    const SOURCE: &'static str = "orders";

    fn key(&self) -> Uuid {
        self.order_id.as_uuid()
    }
}

impl Event for OrderCancelled {
    const SUBJECT: &'static str = "gozon.orders.cancelled";
    const STREAM: &'static str = ORDERS_STREAM;
    const TYPE: &'static str = "gozon.order.cancelled.v1";
    const SOURCE: &'static str = "orders";

    fn key(&self) -> Uuid {
        self.order_id.as_uuid()
    }
}
