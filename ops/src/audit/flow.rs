//! Outboxes, inboxes and dead letters: events that are missing, late, or were not applied.

use sea_orm::{DatabaseConnection, DbErr, FromQueryResult, Value};
use uuid::Uuid;

use super::{Databases, FINDINGS_MAX, FindingKind, Options, Report, add_findings, rows};

/// Orders whose event was never enqueued. Orders older than the last pruning are skipped, since
/// their outbox rows may have been deleted.
const ORDERS_WITHOUT_EVENT: &str = "
    SELECT o.id::text AS id, format('no %s in the outbox', CASE WHEN placed.event_id IS NULL THEN 'OrderPlaced' ELSE 'final event' END) AS detail
    FROM orders o
    LEFT JOIN outbox placed ON placed.event_id = o.placed_event_id AND placed.n = 0
    LEFT JOIN outbox final ON final.event_id = o.final_event_id AND final.n = 0
    WHERE o.stored_at > (SELECT outbox_before FROM retention)
      AND (placed.event_id IS NULL OR (o.status <> 'NEW' AND final.event_id IS NULL))";

const DECISIONS_WITHOUT_ANSWER: &str = "
    SELECT p.order_id::text AS id, 'no PaymentSettled in the outbox' AS detail
    FROM payments p LEFT JOIN outbox answer ON answer.event_id = p.event_id
    WHERE p.decided_at > (SELECT outbox_before FROM retention) AND answer.event_id IS NULL";

const DOUBLED_ORDER_KEYS: &str = "
    SELECT user_id || ' ' || idempotency_key AS id, format('%s orders under one key', count(*)) AS detail
    FROM orders GROUP BY user_id, idempotency_key HAVING count(*) > 1";

/// Requests in the inbox of payments without a decision. The inbox row and the decision are one
/// transaction, and a request that could not be applied is a dead letter.
const REQUESTS_NOT_APPLIED: &str = "
    SELECT i.event_id AS id FROM inbox i LEFT JOIN payments p ON p.request_event_id = i.event_id
    WHERE i.consumer = 'payments-order-placed' AND p.order_id IS NULL
      AND NOT EXISTS (SELECT FROM dead_letters d WHERE d.event_id = i.event_id)
    ORDER BY i.event_id LIMIT $1";
const ORDERS_OF_REQUESTS: &str = "SELECT id FROM orders WHERE placed_event_id = ANY($1::uuid[])";

/// Answers in the inbox of orders that made no order final.
const ANSWERS_NOT_APPLIED: &str = "
    SELECT i.event_id AS id FROM inbox i LEFT JOIN orders o ON o.settlement_event_id = i.event_id
    WHERE i.consumer = 'orders-payment-settled' AND o.id IS NULL
      AND NOT EXISTS (SELECT FROM dead_letters d WHERE d.event_id = i.event_id)
    ORDER BY i.event_id LIMIT $1";
const ORDERS_OF_ANSWERS: &str =
    "SELECT order_id AS id FROM payments WHERE event_id = ANY($1::uuid[])";
const ORDERS_STILL_NEW: &str =
    "SELECT id FROM orders WHERE id = ANY($1::uuid[]) AND status = 'NEW'";

pub(super) async fn check(
    databases: &Databases,
    options: Options,
    report: &mut Report,
) -> Result<(), DbErr> {
    add_findings(
        &databases.orders,
        FindingKind::MissingEvent,
        ORDERS_WITHOUT_EVENT,
        report,
    )
    .await?;
    add_findings(
        &databases.payments,
        FindingKind::MissingEvent,
        DECISIONS_WITHOUT_ANSWER,
        report,
    )
    .await?;
    add_findings(
        &databases.orders,
        FindingKind::DoubledKey,
        DOUBLED_ORDER_KEYS,
        report,
    )
    .await?;
    not_applied(databases, report).await?;
    let late = format!(
        "SELECT event_id || '.' || n AS id, format('%s is unpublished since %s after %s attempts', subject, created_at, attempts) AS detail
         FROM outbox WHERE published_at IS NULL AND created_at < now() - make_interval(secs => {})",
        options.late_after.as_secs_f64()
    );
    // A dead letter that was replayed and did not come back is resolved.
    let dead = "SELECT id::text AS id, format('%s at %s: %s', kind, consumer, cause) AS detail FROM dead_letters
                WHERE replayed_at IS NULL OR last_seen_at > replayed_at";
    for db in [&databases.orders, &databases.payments] {
        add_findings(db, FindingKind::LatePublication, &late, report).await?;
        add_findings(db, FindingKind::DeadLetter, dead, report).await?;
    }
    Ok(())
}

/// Compares the inboxes with their effects. Only ids that exist in the other database count: a
/// forged message was quarantined, and an operator may have dropped its dead letter.
async fn not_applied(databases: &Databases, report: &mut Report) -> Result<(), DbErr> {
    let (orders, payments) = (&databases.orders, &databases.payments);
    let requests = ids(
        payments,
        REQUESTS_NOT_APPLIED,
        vec![(FINDINGS_MAX as i64).into()],
    )
    .await?;
    for id in ids(orders, ORDERS_OF_REQUESTS, vec![requests.into()]).await? {
        report.add(
            FindingKind::NotApplied,
            id,
            "the request is in the inbox of payments, but there is no decision",
        );
    }
    // Only orders that are still NEW count. After payments was restored from a backup, an order may
    // get a second answer, which rightly has no effect.
    let answers = ids(
        orders,
        ANSWERS_NOT_APPLIED,
        vec![(FINDINGS_MAX as i64).into()],
    )
    .await?;
    let answered = ids(payments, ORDERS_OF_ANSWERS, vec![answers.into()]).await?;
    for id in ids(orders, ORDERS_STILL_NEW, vec![answered.into()]).await? {
        report.add(
            FindingKind::NotApplied,
            id,
            "the answer is in the inbox of orders, but the order is still NEW",
        );
    }
    Ok(())
}

async fn ids(db: &DatabaseConnection, query: &str, values: Vec<Value>) -> Result<Vec<Uuid>, DbErr> {
    #[derive(FromQueryResult)]
    struct Row {
        id: Uuid,
    }
    let found: Vec<Row> = rows(db, query, values).await?;
    Ok(found.into_iter().map(|row| row.id).collect())
}
