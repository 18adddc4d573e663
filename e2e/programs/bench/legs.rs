//! Splits the latency of orders into legs, from timestamps of the client and of both databases.

use std::collections::HashMap;

use ops::audit::Databases;
use sea_orm::{DbBackend, FromQueryResult, Statement};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::load::TimedOrder;
use crate::report::percentile;

/// The legs in order: from the request through the three transactions that place, charge and settle
/// the order, to the answer.
pub(crate) const LEGS: [&str; 6] = [
    "sent_to_placing",
    "placing_to_published",
    "published_to_charging",
    "charging_to_published",
    "published_to_ending",
    "ending_to_answered",
];

#[derive(FromQueryResult)]
struct InOrders {
    id: Uuid,
    created_at: OffsetDateTime,
    published_at: OffsetDateTime,
    ending_at: OffsetDateTime,
}

#[derive(FromQueryResult)]
struct InPayments {
    order_id: Uuid,
    charging_at: OffsetDateTime,
    published_at: OffsetDateTime,
}

/// Median milliseconds per leg. A publish is recorded when its acknowledgement arrives, and the
/// consumer may have the message earlier, so the leg that follows a publish can be negative.
pub(crate) async fn medians(
    databases: &Databases,
    waited: &[TimedOrder],
) -> anyhow::Result<[f64; LEGS.len()]> {
    let ids: Vec<Uuid> = waited.iter().map(|one| one.id).collect();
    let waited: HashMap<Uuid, &TimedOrder> = waited.iter().map(|one| (one.id, one)).collect();
    let query = "SELECT o.id, o.created_at, b.published_at, e.created_at AS ending_at FROM orders o
                 JOIN outbox b ON b.event_id = o.placed_event_id AND b.n = 0 JOIN outbox e ON e.event_id = o.final_event_id
                 WHERE o.id = ANY($1) AND b.published_at IS NOT NULL";
    let orders = InOrders::find_by_statement(Statement::from_sql_and_values(
        DbBackend::Postgres,
        query,
        [ids.clone().into()],
    ));
    let query = "SELECT p.order_id, o.created_at AS charging_at, o.published_at FROM payments p
                 JOIN outbox o ON o.event_id = p.event_id AND o.n = 0 WHERE p.order_id = ANY($1) AND o.published_at IS NOT NULL";
    let payments = InPayments::find_by_statement(Statement::from_sql_and_values(
        DbBackend::Postgres,
        query,
        [ids.into()],
    ));
    let payments: HashMap<Uuid, InPayments> = payments
        .all(&databases.payments)
        .await?
        .into_iter()
        .map(|row| (row.order_id, row))
        .collect();
    let mut legs: [Vec<f64>; LEGS.len()] = Default::default();
    for order in orders.all(&databases.orders).await? {
        let (Some(payment), Some(waited)) = (payments.get(&order.id), waited.get(&order.id)) else {
            continue;
        };
        let stops = [
            waited.due,
            order.created_at,
            order.published_at,
            payment.charging_at,
            payment.published_at,
            order.ending_at,
            waited.answered,
        ];
        for (leg, pair) in legs.iter_mut().zip(stops.windows(2)) {
            leg.push((pair[1] - pair[0]).as_seconds_f64() * 1000.0);
        }
    }
    Ok(legs.map(|mut leg| {
        leg.sort_by(f64::total_cmp);
        percentile(&leg, 0.5)
    }))
}
