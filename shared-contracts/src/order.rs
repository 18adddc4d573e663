//! Events of `orders`.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{Amount, DeclineReason, Event, ORDERS_STREAM, OrderId, UserId};

/// An order was accepted and waits for its payment. `payments` answers with `PaymentSettled`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct OrderPlaced {
    /// The order.
    pub order_id: OrderId,
    /// The customer who pays.
    pub user_id: UserId,
    /// The price, in minor units.
    pub amount: Amount,
}

/// An order was paid and is final.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct OrderFinished {
    /// The order.
    pub order_id: OrderId,
    /// The customer who paid.
    pub user_id: UserId,
    /// The debited amount, in minor units.
    pub amount: Amount,
}

/// An order was not paid and is final.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct OrderCancelled {
    /// The order.
    pub order_id: OrderId,
    /// The customer.
    pub user_id: UserId,
    /// The price, in minor units. Nothing was debited.
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
