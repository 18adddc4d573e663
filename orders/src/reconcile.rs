//! Tells the engine which orders are still NEW and must be re-asked, and rebuilds their requests.
//!
//! Nothing here decides how an order ends. Only payments knows whether it was paid: it answers with
//! its stored decision, or decides now.

use messaging::{Request, RequestTable, Requests, Transaction};
use sea_orm::DbErr;
use shared_contracts::{Amount, OrderId, OrderPlaced, UserId};
use uuid::Uuid;

use crate::entity::order::{self, Model};
use crate::metrics;

/// Orders whose payment is not decided yet.
pub(crate) struct UnsettledOrders;

impl Requests for UnsettledOrders {
    type Event = OrderPlaced;

    const TABLE: RequestTable = RequestTable {
        name: "orders",
        is_pending: "r.status = 'NEW'",
        event_id: "placed_event_id",
        asks: "asks",
        asked_at: "asked_at",
        stored_at: "stored_at",
    };

    const READ_BY: &'static str = "payments-order-placed";

    async fn load(
        &self,
        txn: &Transaction,
        ids: &[Uuid],
    ) -> Result<Vec<Request<OrderPlaced>>, DbErr> {
        let orders = order::find_all(txn, ids.to_vec()).await?;
        let request = |order: &Model| Request {
            id: order.id,
            event: placed(order),
        };
        Ok(orders.iter().map(request).collect())
    }

    fn asked(&self, requests: usize) {
        metrics::asked_again(requests);
    }
}

fn placed(order: &Model) -> anyhow::Result<OrderPlaced> {
    Ok(OrderPlaced {
        order_id: OrderId::from(order.id),
        user_id: UserId::parse(order.user_id.as_str())?,
        amount: Amount::new(order.amount)?,
    })
}
