//! Recovery from lost or old messages is as fast as normal processing.
//!
//! `GOZON_LONG=1` runs the full forms.

use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream;
use sea_orm::{ConnectionTrait as _, DatabaseConnection, DbBackend, Statement};
use serde_json::json;
use stack::testing::eventually;
use tokio::time::Instant;

use crate::shop::{SOON, Shop, until_done};

fn is_long() -> bool {
    std::env::var_os("GOZON_LONG").is_some()
}

async fn count(db: &DatabaseConnection, sql: &str) -> i64 {
    let statement = Statement::from_string(DbBackend::Postgres, sql);
    let row = db.query_one_raw(statement).await.unwrap().unwrap();
    row.try_get_by_index(0).unwrap()
}

/// Places orders of alice, 64 at a time.
async fn place(shop: &Shop, orders: usize) {
    let body = json!({ "user_id": "alice", "amount": 1 });
    stream::iter(0..orders)
        .for_each_concurrent(64, async |_| {
            until_done(&shop.http, "/v1/orders", &body).await;
        })
        .await;
}

#[tokio::test]
async fn f67_orders_that_the_stream_could_not_hold_end_soon_after_payments_returns() {
    // The stream holds about a third of the requests.
    let (orders, bytes, within) = if is_long() {
        (200_000, "10000000", Duration::from_secs(500))
    } else {
        (1500, "250000", Duration::from_secs(15))
    };
    let environment = [
        ("GOZON_STREAM_MAX_BYTES", bytes),
        ("GOZON_ASK_AGAIN_MS", "2000"),
    ];
    let mut shop = Shop::start_with(&environment).await;
    shop.customer("alice", 1_000_000_000).await;
    shop.stack.system.stop("payments").await.unwrap();
    place(&shop, orders).await;
    let db = shop.database("orders").await;
    let new = "SELECT count(*) FROM orders WHERE status = 'NEW'";
    assert_eq!(count(&db, new).await, orders as i64);

    shop.stack.system.start("payments").await.unwrap();
    let returned = Instant::now();
    eventually("all orders end", within, async || {
        (count(&db, new).await == 0).then_some(())
    })
    .await;
    let rate = orders as f64 / returned.elapsed().as_secs_f64();
    println!(
        "{orders} orders became final in {:?}, {rate:.0}/s",
        returned.elapsed()
    );
    // Each evicted request is re-asked once: re-asks do not evict unread requests.
    let asked_twice = "SELECT count(*) FROM orders WHERE asks > 2";
    let asked_twice = count(&db, asked_twice).await;
    assert!(
        asked_twice < orders as i64 / 10,
        "{asked_twice} orders were re-asked more than twice"
    );
    shop.assert_settled(orders).await;
}

#[tokio::test]
async fn f68_live_orders_do_not_wait_for_events_that_are_sent_again() {
    let rows = if is_long() { 300_000 } else { 20_000 };
    let shop = Shop::start().await;
    shop.customer("alice", 1_000_000).await;
    let db = shop.database("orders").await;
    // Finished events that were published an hour ago.
    let fill = format!(
        "INSERT INTO outbox (event_id, subject, headers, payload, attempts, created_at,
                             published_at, stream_sequence)
         SELECT (lpad(to_hex((extract(epoch FROM now() - interval '1 hour') * 1000)::bigint), 12, '0')
                 || lpad(to_hex(i), 20, '0'))::uuid,
                'gozon.orders.finished', '{{\"Nats-Expected-Stream\":\"ORDERS\"}}', '{{}}', 1,
                now() - interval '1 hour', now() - interval '1 hour', i
         FROM generate_series(1, {rows}) AS i"
    );
    db.execute_unprepared(&fill).await.unwrap();
    let live = async || {
        let begun = Instant::now();
        assert_eq!(shop.order("alice", 1).await.0, "FINISHED");
        begun.elapsed()
    };
    let mut usual = Vec::new();
    for _ in 0..20 {
        usual.push(live().await);
    }
    let resend = async {
        let since = time::OffsetDateTime::now_utc() - time::Duration::hours(2);
        let resend = messaging::Resend {
            since,
            subject: Some("gozon.orders.finished"),
        };
        resend.run(&db).await.unwrap()
    };
    let waits = "SELECT count(*) FROM outbox WHERE published_at IS NULL";
    let mut during = Vec::new();
    let orders = async {
        loop {
            during.push(live().await);
            if during.len() >= 20 && count(&db, waits).await == 0 {
                return;
            }
        }
    };
    let (resent, ()) = tokio::join!(resend, orders);
    assert!(resent >= rows, "{resent}");
    usual.sort();
    during.sort();
    let (usual, worst) = (usual[usual.len() - 1], during[during.len() * 99 / 100]);
    println!("{resent} events resent; p99 {worst:?}, before {usual:?}");
    assert!(
        worst < usual + Duration::from_millis(100),
        "{worst:?}, before {usual:?}"
    );
    eventually("everything is published", SOON, async || {
        (count(&db, waits).await == 0).then_some(())
    })
    .await;
}
