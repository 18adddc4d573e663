//! Everything stored about one order, in both databases.

use sea_orm::{ConnectionTrait as _, DatabaseConnection, DbBackend, Statement, Value as SqlValue};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::audit::Databases;

/// All rows about an order, by table.
pub async fn find(databases: &Databases, id: Uuid) -> anyhow::Result<Value> {
    let orders = &databases.orders;
    let payments = &databases.payments;
    let order = json_rows(orders, "SELECT * FROM orders WHERE id = $1", id).await?;
    let decision = json_rows(payments, "SELECT * FROM payments WHERE order_id = $1", id).await?;
    let dead_letters = "SELECT id, kind, cause FROM dead_letters WHERE order_id = $1";
    let dead_letters = [
        json_rows(orders, dead_letters, id).await?,
        json_rows(payments, dead_letters, id).await?,
    ]
    .concat();
    anyhow::ensure!(
        !order.is_empty() || !decision.is_empty(),
        "there is no order {id}"
    );
    Ok(json!({
        "order": order.first(),
        "requests": json_rows(orders, "SELECT b.* FROM outbox b JOIN orders o ON b.event_id = o.placed_event_id WHERE o.id = $1 ORDER BY n", id).await?,
        "taken_by_payments": json_rows(payments, "SELECT i.* FROM inbox i JOIN payments p ON i.consumer = 'payments-order-placed' AND i.event_id = p.request_event_id WHERE p.order_id = $1", id).await?,
        "decision": decision.first(),
        "debits": json_rows(payments, "SELECT * FROM transfers WHERE kind = 'payment' AND order_id = $1", id).await?,
        "answers": json_rows(payments, "SELECT b.* FROM outbox b JOIN payments p ON b.event_id = p.event_id WHERE p.order_id = $1 ORDER BY n", id).await?,
        "taken_by_orders": json_rows(orders, "SELECT i.* FROM inbox i JOIN orders o ON i.consumer = 'orders-payment-settled' AND i.event_id = o.settlement_event_id WHERE o.id = $1", id).await?,
        "ends": json_rows(orders, "SELECT b.* FROM outbox b JOIN orders o ON b.event_id = o.final_event_id WHERE o.id = $1 ORDER BY n", id).await?,
        "dead_letters": dead_letters,
    }))
}

async fn json_rows(db: &DatabaseConnection, query: &str, id: Uuid) -> anyhow::Result<Vec<Value>> {
    let query = format!("SELECT row_to_json(t)::text AS row FROM ({query}) t");
    let rows = db
        .query_all_raw(Statement::from_sql_and_values(
            DbBackend::Postgres,
            query,
            [SqlValue::from(id)],
        ))
        .await?;
    rows.iter()
        .map(|row| Ok(serde_json::from_str(&row.try_get::<String>("", "row")?)?))
        .collect()
}
