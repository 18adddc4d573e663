//! Faults planted in copies of healthy databases.

use std::time::{Duration, Instant};

use async_nats::HeaderMap;
use broker::Broker;
use futures_util::future::join_all;
use ops::audit::{
    CompareWith, Databases, FindingKind, Options, Report, audit, audit_once, audit_with,
};
use sea_orm::{ConnectionTrait as _, DatabaseConnection, DbBackend, Statement};
use serde_json::json;
use stack::http::Http;
use stack::testing::TestStack;

use crate::harness::operator;

const WITHOUT_GRACE: Options = Options {
    grace: Duration::ZERO,
    stuck_after: Duration::from_secs(3600),
    late_after: Duration::from_secs(3600),
};

/// 30 orders of three users; two thirds of them are paid.
async fn shop_with_30_orders() -> TestStack {
    let stack = TestStack::start().await.unwrap();
    let http = Http::new(stack.system.address("gateway"));
    for user in ["alice", "bob", "carol"] {
        assert_eq!(
            http.post("/v1/accounts", None, &json!({ "user_id": user }))
                .await
                .unwrap()
                .status,
            201
        );
        for _ in 0..2 {
            let paid_in = http
                .post(
                    &format!("/v1/accounts/{user}/deposits"),
                    None,
                    &json!({ "amount": 100 }),
                )
                .await
                .unwrap();
            assert_eq!(paid_in.status, 201);
        }
    }
    join_all((0..30).map(async |number| {
        let user = ["alice", "bob", "carol"][number % 3];
        let body = json!({ "user_id": user, "amount": 30 });
        let placed = http.post("/v1/orders", None, &body).await.unwrap().json();
        let ended = http
            .get(&format!(
                "/v1/orders/{}?wait=30",
                placed["id"].as_str().unwrap()
            ))
            .await
            .unwrap()
            .json();
        assert_ne!(ended["status"], "NEW");
    }))
    .await;
    stack
}

async fn databases(stack: &TestStack, orders: &str, payments: &str) -> Databases {
    let connect = async |name: &str| stack.system.postgres().connect(name).await.unwrap();
    Databases {
        orders: connect(orders).await,
        payments: connect(payments).await,
    }
}

async fn text(db: &DatabaseConnection, sql: &str) -> String {
    db.query_one_raw(Statement::from_string(DbBackend::Postgres, sql))
        .await
        .unwrap()
        .unwrap()
        .try_get_by_index(0)
        .unwrap()
}

fn kinds(report: &Report) -> Vec<FindingKind> {
    report.findings.iter().map(|finding| finding.kind).collect()
}

/// A change to one database, and the kind and id that the audit must report. `id` is a query.
struct Fault {
    payments: bool,
    planted: &'static str,
    kind: FindingKind,
    id: &'static str,
}

const fn in_orders(kind: FindingKind, id: &'static str, planted: &'static str) -> Fault {
    Fault {
        payments: false,
        planted,
        kind,
        id,
    }
}

const fn in_payments(kind: FindingKind, id: &'static str, planted: &'static str) -> Fault {
    Fault {
        payments: true,
        planted,
        kind,
        id,
    }
}

const FIRST_FINISHED: &str = "SELECT min(id::text) FROM orders WHERE status = 'FINISHED'";
const FIRST_CANCELLED: &str = "SELECT min(id::text) FROM orders WHERE status = 'CANCELLED'";
const FIRST_PAID: &str = "SELECT min(order_id::text) FROM payments WHERE outcome = 'paid'";
const FIRST_DECLINED: &str = "SELECT min(order_id::text) FROM payments WHERE outcome = 'declined'";

const FAULTS: [Fault; 22] = [
    in_orders(
        FindingKind::CancelledButDebited,
        FIRST_FINISHED,
        "UPDATE orders SET status = 'CANCELLED', reason = 'insufficient_funds' WHERE id::text = $id",
    ),
    in_orders(FindingKind::FinishedWithoutDebit, FIRST_CANCELLED, "UPDATE orders SET status = 'FINISHED', reason = NULL WHERE id::text = $id"),
    in_orders(FindingKind::StatusDisagrees, FIRST_CANCELLED, "UPDATE orders SET reason = 'no_account' WHERE id::text = $id"),
    in_orders(FindingKind::Divergent, FIRST_FINISHED, "UPDATE orders SET amount = 31 WHERE id::text = $id"),
    in_orders(FindingKind::Divergent, FIRST_CANCELLED, "UPDATE orders SET user_id = 'mallory' WHERE id::text = $id"),
    in_orders(
        FindingKind::Stuck,
        FIRST_FINISHED,
        "UPDATE orders SET status = 'NEW', final_event_id = NULL, stored_at = now() - interval '2 hours' WHERE id::text = $id",
    ),
    in_orders(
        FindingKind::Quarantined,
        FIRST_FINISHED,
        "UPDATE orders SET status = 'NEW', final_event_id = NULL WHERE id::text = $id;
         INSERT INTO dead_letters (id, consumer, message_key, kind, cause, order_id, subject, stream, stream_sequence, delivered, headers, payload)
         VALUES (gen_random_uuid(), 'c', 'k', 'quarantine', 'planted', $id::uuid, 's', 'S', 1, 1, '', '')",
    ),
    in_orders(FindingKind::Unexpected, FIRST_FINISHED, "DELETE FROM orders WHERE id::text = $id"),
    in_orders(
        FindingKind::DoubledKey,
        "SELECT user_id || ' twin' FROM orders WHERE id::text = (SELECT min(id::text) FROM orders)",
        "DROP INDEX orders_idempotency_key;
         UPDATE orders SET idempotency_key = 'twin' WHERE user_id = (SELECT user_id FROM orders ORDER BY id::text LIMIT 1)",
    ),
    in_orders(
        FindingKind::MissingEvent,
        FIRST_FINISHED,
        "DELETE FROM outbox WHERE event_id = (SELECT final_event_id FROM orders WHERE id::text = $id)",
    ),
    in_orders(
        FindingKind::LatePublication,
        "SELECT min(event_id || '.' || n) FROM outbox",
        "UPDATE outbox SET published_at = NULL, stream_sequence = NULL, created_at = now() - interval '2 hours' WHERE event_id || '.' || n = $id",
    ),
    in_orders(
        FindingKind::NotApplied,
        FIRST_FINISHED,
        "UPDATE orders SET status = 'NEW', settlement_event_id = NULL, final_event_id = NULL WHERE id::text = $id",
    ),
    in_payments(FindingKind::NotApplied, FIRST_DECLINED, "DELETE FROM payments WHERE order_id::text = $id"),
    in_payments(
        FindingKind::DoubledDebit,
        FIRST_PAID,
        "DROP INDEX transfers_payment_of_order;
         INSERT INTO transfers (id, kind, user_id, entry_no, debit_account, credit_account, amount, balance_after, order_id)
         SELECT gen_random_uuid(), kind, user_id, 99, debit_account, credit_account, amount, balance_after, order_id
         FROM transfers WHERE order_id::text = $id",
    ),
    in_payments(FindingKind::Unmatched, FIRST_PAID, "DELETE FROM transfers WHERE order_id::text = $id"),
    in_payments(FindingKind::Unmatched, FIRST_PAID, "DELETE FROM payments WHERE order_id::text = $id"),
    in_payments(
        FindingKind::Unmatched,
        FIRST_DECLINED,
        "INSERT INTO transfers (id, kind, user_id, entry_no, debit_account, credit_account, amount, balance_after, order_id)
         SELECT gen_random_uuid(), 'payment', user_id, 99, 'user:' || user_id, 'shop', amount, 0, order_id FROM payments WHERE order_id::text = $id",
    ),
    in_payments(FindingKind::Divergent, FIRST_PAID, "UPDATE transfers SET amount = 29 WHERE order_id::text = $id"),
    in_payments(FindingKind::BalanceDrift, "SELECT min(user_id) FROM accounts", "UPDATE accounts SET balance = balance + 1 WHERE user_id = $id"),
    in_payments(
        FindingKind::NegativeBalance,
        "SELECT min(user_id) FROM accounts",
        "ALTER TABLE accounts DROP CONSTRAINT accounts_balance_check; UPDATE accounts SET balance = -1 WHERE user_id = $id",
    ),
    in_payments(
        FindingKind::BrokenStatement,
        "SELECT min(user_id || ' entry ' || entry_no) FROM transfers WHERE kind = 'payment'",
        "UPDATE transfers SET balance_after = balance_after + 1 WHERE user_id || ' entry ' || entry_no = $id",
    ),
    in_payments(
        FindingKind::MalformedTransfer,
        "SELECT min(id::text) FROM transfers",
        "ALTER TABLE transfers DROP CONSTRAINT transfers_check; UPDATE transfers SET credit_account = 'user:mallory' WHERE id::text = $id",
    ),
];

#[tokio::test]
async fn every_planted_fault_is_reported_and_a_healthy_system_has_none() {
    let mut stack = shop_with_30_orders().await;
    let report = audit(
        &databases(&stack, "orders", "payments").await,
        Options::default(),
    )
    .await
    .unwrap();
    assert_eq!(
        report.findings,
        [],
        "a healthy, running system has no findings"
    );
    assert_eq!(
        (
            report.orders,
            report.decisions,
            report.accounts,
            report.transfers
        ),
        (30, 30, 3, 6 + 18)
    );

    // PostgreSQL copies a database only while it has no connections.
    for name in ["gateway", "orders", "payments"] {
        stack.system.stop(name).await.unwrap();
    }
    let server = stack.system.postgres().connect("postgres").await.unwrap();
    for (number, fault) in FAULTS.iter().enumerate() {
        let (orders, payments) = (format!("orders_{number}"), format!("payments_{number}"));
        server
            .execute_unprepared(&format!("CREATE DATABASE {orders} TEMPLATE orders"))
            .await
            .unwrap();
        server
            .execute_unprepared(&format!("CREATE DATABASE {payments} TEMPLATE payments"))
            .await
            .unwrap();
        let copies = databases(&stack, &orders, &payments).await;
        let broken = if fault.payments {
            &copies.payments
        } else {
            &copies.orders
        };
        let id = text(broken, fault.id).await;
        // Triggers and foreign keys are off, as for a superuser who makes a mistake.
        let planted = format!(
            "SET session_replication_role = replica; {}",
            fault.planted.replace("$id", &format!("'{id}'"))
        );
        broken.execute_unprepared(&planted).await.unwrap();

        let report = audit(&copies, WITHOUT_GRACE).await.unwrap();
        let named = report
            .findings
            .iter()
            .any(|finding| finding.kind == fault.kind && finding.id == id);
        assert!(
            named,
            "{:?} of {id} after {}: {:?}",
            fault.kind,
            fault.planted,
            kinds(&report)
        );
        copies.orders.close().await.unwrap();
        copies.payments.close().await.unwrap();
    }
}

#[tokio::test]
async fn work_in_progress_is_no_finding() {
    // A decision exists before its order is final. The first pass may see that, the second does
    // not.
    let stack = shop_with_30_orders().await;
    let live = databases(&stack, "orders", "payments").await;
    let other = stack.system.postgres().connect("orders").await.unwrap();
    let id = text(&other, FIRST_FINISHED).await;
    let break_order = format!(
        "SET session_replication_role = replica; UPDATE orders SET reason = NULL, status = 'NEW', final_event_id = NULL, stored_at = now() - interval '2 hours' WHERE id = '{id}'"
    );
    let final_event = text(
        &other,
        &format!("SELECT final_event_id::text FROM orders WHERE id = '{id}'"),
    )
    .await;
    other.execute_unprepared(&break_order).await.unwrap();
    let first = audit_once(&live, WITHOUT_GRACE).await.unwrap();
    assert_eq!(kinds(&first), [FindingKind::Stuck]);
    let repair = format!(
        "UPDATE orders SET status = 'FINISHED', final_event_id = '{final_event}' WHERE id = '{id}'"
    );
    other.execute_unprepared(&repair).await.unwrap();
    let second = audit_once(&live, WITHOUT_GRACE).await.unwrap();
    assert_eq!(second.still_standing(&first).findings, []);
}

/// The largest atomic batch that the broker accepts.
const BATCH: u64 = 1000;
/// In a release build, which operators use, there are messages about all orders.
const MESSAGES_PER_SUBJECT: u64 = if cfg!(debug_assertions) {
    10_000
} else {
    100_000
};
/// The time limit is meant for a release build. A debug build gets more time, since other tests run
/// at the same time.
const AUDITED_WITHIN: Duration = Duration::from_secs(if cfg!(debug_assertions) { 30 } else { 10 });

/// Publishes a message about each order that the test inserts into the databases.
async fn publish_many(broker: &Broker, subject: &'static str, kind: &str, more: &str) {
    for first in (1..=MESSAGES_PER_SUBJECT).step_by(BATCH as usize) {
        for number in first..first + BATCH {
            let id = format!("00000000-0000-7000-8000-{number:012x}");
            let mut headers = HeaderMap::new();
            let batch_sequence = (number - first + 1).to_string();
            let batch = format!("{subject}-{first}");
            for (name, value) in [
                ("ce-specversion", "1.0"),
                ("ce-type", kind),
                ("ce-subject", &id),
                ("ce-id", &id),
                ("Nats-Batch-Id", &batch[batch.len().saturating_sub(60)..]),
                ("Nats-Batch-Sequence", &batch_sequence),
            ] {
                headers.insert(name, value);
            }
            let body = format!(r#"{{"order_id":"{id}","user_id":"rich","amount":1{more}}}"#);
            if number < first + BATCH - 1 {
                broker
                    .client()
                    .publish_with_headers(subject, headers, body.into())
                    .await
                    .unwrap();
            } else {
                headers.insert("Nats-Batch-Commit", "1");
                broker
                    .jetstream()
                    .publish_with_headers(subject, headers, body.into())
                    .await
                    .unwrap()
                    .await
                    .unwrap();
            }
        }
    }
}

#[tokio::test]
async fn a_hundred_thousand_orders_are_checked_in_seconds() {
    let mut stack = shop_with_30_orders().await;
    for name in ["gateway", "orders", "payments"] {
        stack.system.stop(name).await.unwrap();
    }
    let live = databases(&stack, "orders", "payments").await;
    // A hundred thousand equal orders of one user, with the same ids in both databases.
    let id = "('00000000-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid";
    let published = format!(
        "INSERT INTO outbox (event_id, n, subject, headers, payload, attempts, created_at, published_at, stream_sequence)
         SELECT {id}, 0, 's', '{{}}', '{{}}', 1, now() - interval '1 day', now(), n FROM generate_series(1, 100000) n"
    );
    live.orders
        .execute_unprepared(&format!(
            "INSERT INTO orders (id, user_id, amount, description, status, idempotency_key, request_hash, placed_event_id, settlement_event_id, final_event_id, created_at, updated_at)
             SELECT {id}, 'rich', 1, '', 'FINISHED', n::text, '', {id}, {id}, {id}, now() - interval '1 day', now() FROM generate_series(1, 100000) n;
             INSERT INTO inbox (consumer, event_id, stream_sequence, delivered) SELECT 'orders-payment-settled', {id}, n, 1 FROM generate_series(1, 100000) n;
             {published}"
        ))
        .await
        .unwrap();
    live.payments
        .execute_unprepared(&format!(
            "INSERT INTO accounts (user_id, balance, entry_no, idempotency_key, created_at) VALUES ('rich', 0, 100001, 'k', now());
             INSERT INTO transfers (id, kind, user_id, entry_no, debit_account, credit_account, amount, balance_after, idempotency_key, request_hash)
             VALUES (gen_random_uuid(), 'deposit', 'rich', 1, 'world', 'user:rich', 100000, 100000, 'd', '');
             INSERT INTO transfers (id, kind, user_id, entry_no, debit_account, credit_account, amount, balance_after, order_id)
             SELECT {id}, 'payment', 'rich', n + 1, 'user:rich', 'shop', 1, 100000 - n, {id} FROM generate_series(1, 100000) n;
             INSERT INTO payments (order_id, user_id, amount, request_hash, outcome, transfer_id, request_event_id, event_id, decided_at)
             SELECT {id}, 'rich', 1, '', 'paid', {id}, {id}, {id}, now() - interval '1 day' FROM generate_series(1, 100000) n;
             INSERT INTO inbox (consumer, event_id, stream_sequence, delivered) SELECT 'payments-order-placed', {id}, n, 1 FROM generate_series(1, 100000) n;
             {published}"
        ))
        .await
        .unwrap();
    let broker = operator(&stack).await;
    for (subject, kind, more) in [
        ("gozon.orders.placed", "gozon.order.placed.v1", ""),
        (
            "gozon.payments.settled",
            "gozon.payment.settled.v1",
            r#","outcome":"paid""#,
        ),
        ("gozon.orders.finished", "gozon.order.finished.v1", ""),
    ] {
        publish_many(&broker, subject, kind, more).await;
    }
    let compare_with = CompareWith {
        streams: Some(broker.jetstream()),
        history: None,
    };
    let begun = Instant::now();
    let report = audit_with(&live, Options::default(), compare_with)
        .await
        .unwrap();
    assert_eq!(
        (report.findings.as_slice(), report.not_looked_at.as_slice()),
        ([].as_slice(), [].as_slice())
    );
    assert_eq!((report.orders, report.transfers), (100_030, 100_001 + 24));
    assert!(
        report.messages >= 3 * MESSAGES_PER_SUBJECT,
        "{}",
        report.messages
    );
    println!(
        "{} orders and {} messages in {:?}",
        report.orders,
        report.messages,
        begun.elapsed()
    );
    assert!(
        begun.elapsed() < AUDITED_WITHIN,
        "it took {:?}",
        begun.elapsed()
    );

    // With very many findings of one kind, the first are listed and one says that there are more.
    live.payments
        .execute_unprepared(
            "ALTER TABLE transfers DROP CONSTRAINT transfers_check; SET session_replication_role = replica; UPDATE transfers SET debit_account = 'user:mallory' WHERE user_id = 'rich'",
        )
        .await
        .unwrap();
    let report = audit(&live, WITHOUT_GRACE).await.unwrap();
    assert_eq!(report.findings.len(), 1001);
    assert!(
        report
            .findings
            .iter()
            .any(|finding| finding.id == "and more"),
        "{:?}",
        report.findings.last()
    );
}
