//! Outboxes, inboxes and dead letters: facts that should be there, that wait for too long, or that nobody could take.

use sea_orm::DbErr;

use super::{Databases, Kind, Options, Report, find};

/// Orders whose fact was never enqueued. Old rows are pruned, the older one first: where the first fact is still there,
/// the last one must be too; where it is not, the order must be older than everything that is left.
const ORDERS_WITHOUT_EVENT: &str = "
    SELECT o.id::text AS id, format('no %s in the outbox', CASE WHEN placed.event_id IS NULL THEN 'OrderPlaced' ELSE 'final event' END) AS detail
    FROM orders o
    LEFT JOIN outbox placed ON placed.event_id = o.placed_event_id AND placed.n = 0
    LEFT JOIN outbox final ON final.event_id = o.final_event_id AND final.n = 0
    WHERE (placed.event_id IS NOT NULL AND o.status <> 'NEW' AND final.event_id IS NULL)
       OR (placed.event_id IS NULL AND o.created_at > (SELECT coalesce(min(created_at), 'infinity') FROM outbox))";

const DECISIONS_WITHOUT_ANSWER: &str = "
    SELECT p.order_id::text AS id, 'no PaymentSettled in the outbox' AS detail
    FROM payments p LEFT JOIN outbox answer ON answer.event_id = p.event_id
    WHERE p.decided_at > (SELECT coalesce(min(created_at), 'infinity') FROM outbox) AND answer.event_id IS NULL";

const DOUBLED_ORDER_KEYS: &str = "
    SELECT user_id || ' ' || idempotency_key AS id, format('%s orders under one key', count(*)) AS detail
    FROM orders GROUP BY user_id, idempotency_key HAVING count(*) > 1";

pub(super) async fn check(databases: &Databases, options: Options, report: &mut Report) -> Result<(), DbErr> {
    find(&databases.orders, Kind::MissingEvent, ORDERS_WITHOUT_EVENT, report).await?;
    find(&databases.payments, Kind::MissingEvent, DECISIONS_WITHOUT_ANSWER, report).await?;
    find(&databases.orders, Kind::DoubledKey, DOUBLED_ORDER_KEYS, report).await?;
    let late = format!(
        "SELECT event_id || '.' || n AS id, format('%s waits since %s, tried %s times', subject, created_at, attempts) AS detail
         FROM outbox WHERE published_at IS NULL AND created_at < now() - make_interval(secs => {})",
        options.late_after.as_secs_f64()
    );
    // One that was sent again and did not come back is dealt with.
    let dead = "SELECT id::text AS id, format('%s at %s: %s', kind, consumer, cause) AS detail FROM dead_letters
                WHERE replayed_at IS NULL OR last_seen_at > replayed_at";
    for db in [&databases.orders, &databases.payments] {
        find(db, Kind::LatePublication, &late, report).await?;
        find(db, Kind::DeadLetter, dead, report).await?;
    }
    Ok(())
}
