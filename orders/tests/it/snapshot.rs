//! An old snapshot keeps the dead entries of every index, and delays nothing.
//!
//! `GOZON_LONG=1` runs the full form: 5 million published rows and as many final orders.

use std::time::Duration;

use futures_util::future::join_all;
use sea_orm::{ConnectionTrait as _, TransactionTrait as _};
use tokio::time::Instant;

use crate::harness::Orders;

/// The snapshot delays orders by less than this, in milliseconds.
const DELAYED_BY: i64 = 50;

fn is_long() -> bool {
    std::env::var_os("GOZON_LONG").is_some()
}

/// Places 100 orders a second, and returns a percentile of the time from their storage to their
/// publication, in milliseconds: the 99th, or the 90th where other tests run at the same time.
async fn percentile(orders: &Orders, seconds: u32) -> i64 {
    let fraction = if is_long() { "0.99" } else { "0.9" };
    let since = orders
        .count("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint")
        .await;
    let begun = Instant::now();
    let placed = (0..seconds * 100).map(|number| async move {
        tokio::time::sleep_until(begun + Duration::from_millis(10) * number).await;
        orders.placed().await;
    });
    join_all(placed).await;
    let rows =
        format!("FROM outbox WHERE n = 0 AND extract(epoch FROM created_at) * 1000000 >= {since}");
    let unpublished = format!("SELECT count(*) {rows} AND published_at IS NULL");
    orders.until("all are published", &unpublished, 0).await;
    let percentile = format!(
        "SELECT (extract(epoch FROM percentile_disc({fraction})
                     WITHIN GROUP (ORDER BY published_at - created_at)) * 1000)::bigint {rows}"
    );
    orders.count(&percentile).await
}

/// Rows that were pending and are not any more: the snapshot keeps their entries.
async fn leave_dead_entries(orders: &Orders, rows: u64) {
    let outbox = format!(
        "BEGIN;
         INSERT INTO outbox (event_id, subject, headers, payload)
         SELECT ('0190' || lpad(to_hex(i), 28, '0'))::uuid, 's', '{{}}', '{{}}'
         FROM generate_series(1, {rows}) AS i;
         DELETE FROM outbox WHERE subject = 's';
         COMMIT"
    );
    orders.db.execute_unprepared(&outbox).await.unwrap();
    if is_long() {
        let new = format!(
            "BEGIN;
             ALTER TABLE orders DISABLE TRIGGER USER;
             INSERT INTO orders (id, user_id, amount, description, idempotency_key, request_hash,
                                 placed_event_id, created_at, updated_at)
             SELECT ('0190' || lpad(to_hex(i), 28, '0'))::uuid, 'old', 1, '', i::text, '',
                    gen_random_uuid(), now(), now()
             FROM generate_series(1, {rows}) AS i;
             DELETE FROM orders WHERE user_id = 'old';
             ALTER TABLE orders ENABLE TRIGGER USER;
             COMMIT"
        );
        orders.db.execute_unprepared(&new).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f66_an_old_snapshot_delays_no_order() {
    let mut orders = Orders::start().await;
    let rows = if is_long() { 5_000_000 } else { 2_000_000 };
    let usual = percentile(&orders, 1).await;
    let snapshot = orders.database.connect().await.unwrap();
    let snapshot = snapshot
        .begin_with_config(Some(sea_orm::IsolationLevel::RepeatableRead), None)
        .await
        .unwrap();
    snapshot.execute_unprepared("SELECT 1").await.unwrap();
    leave_dead_entries(&orders, rows).await;

    let with_snapshot = percentile(&orders, 2).await;
    println!("usual {usual} ms, with an old snapshot {with_snapshot} ms");
    assert!(
        with_snapshot < usual + DELAYED_BY,
        "{with_snapshot} ms, usual {usual} ms"
    );

    // A row that was handed off to nobody is found among the recent ones, not by a scan.
    let id = orders.placed().await;
    let left = format!(
        "UPDATE outbox SET published_at = NULL, stream_sequence = NULL, attempts = 0
         WHERE event_id = (SELECT placed_event_id FROM orders WHERE id = '{id}')"
    );
    let published = format!(
        "SELECT count(*) FROM outbox WHERE published_at IS NOT NULL
         AND event_id = (SELECT placed_event_id FROM orders WHERE id = '{id}')"
    );
    orders.until("it is published", &published, 1).await;
    orders.db.execute_unprepared(&left).await.unwrap();
    orders.until("it is published again", &published, 1).await;
    snapshot.rollback().await.unwrap();
    orders.stop().await;
}
