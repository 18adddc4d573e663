//! Faults under load: nothing may be lost, doubled or stuck.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use sea_orm::{ConnectionTrait as _, DatabaseConnection, DbBackend, Statement};
use serde_json::json;
use stack::NAMES;
use stack::http::Http;
use stack::testing::eventually;

use crate::shop::{SOON, Shop, fault_lasts, until_done};

pub(crate) const CLIENTS: usize = 8;
pub(crate) const ORDERS_EACH: usize = 15;

/// Orders from several concurrent clients. `when` runs when a third of them is accepted.
pub(crate) async fn place_orders_while(shop: &mut Shop, when: impl AsyncFnOnce(&mut Shop)) {
    let total = CLIENTS * ORDERS_EACH;
    let (http, accepted) = (shop.http.clone(), AtomicUsize::new(0));
    let clients = join_all((0..CLIENTS).map(async |client| {
        for number in 0..ORDERS_EACH {
            let body =
                json!({ "user_id": format!("user-{}", (client + number) % 4), "amount": 10 });
            until_done(&http, "/v1/orders", &body).await;
            accepted.fetch_add(1, Ordering::Relaxed);
        }
    }));
    let fault = async {
        eventually("a third is accepted", SOON, async || {
            (accepted.load(Ordering::Relaxed) >= total / 3).then_some(())
        })
        .await;
        when(shop).await;
    };
    tokio::join!(clients, fault);
}

/// Starts a system with four customers, each with money for 25 of 30 orders.
async fn shop_with_customers() -> Shop {
    with_customers(Shop::start().await).await
}

pub(crate) async fn with_customers(shop: Shop) -> Shop {
    for user in 0..4 {
        shop.customer(&format!("user-{user}"), 250).await;
    }
    shop
}

async fn killed_under_load(name: &str) {
    let mut shop = shop_with_customers().await;
    place_orders_while(&mut shop, async |shop| {
        shop.stack.system.kill(name).await.unwrap();
        // PostgreSQL may need a second attempt while processes of the killed server are exiting.
        eventually("it is running again", SOON, async || {
            shop.stack.system.start(name).await.ok()
        })
        .await;
    })
    .await;
    assert_eq!(
        shop.assert_settled(CLIENTS * ORDERS_EACH).await,
        100,
        "the money pays for this number of orders"
    );
    for user in 0..4 {
        assert_eq!(shop.balance(&format!("user-{user}")).await, 0);
    }
}

#[tokio::test]
async fn f07_orders_is_killed_under_load() {
    killed_under_load("orders").await;
}

#[tokio::test]
async fn f34_payments_is_killed_under_load() {
    killed_under_load("payments").await;
}

#[tokio::test]
async fn f04_the_gateway_is_killed_under_load() {
    killed_under_load("gateway").await;
}

#[tokio::test]
async fn f22_the_broker_is_killed_under_load() {
    killed_under_load("nats").await;
}

#[tokio::test]
async fn f09_the_database_is_killed_under_load() {
    killed_under_load("postgres").await;
}

#[tokio::test]
async fn f24_the_broker_is_wiped_under_load() {
    // All messages and consumers are gone, whether acknowledged or not. Nobody intervenes.
    let mut shop = shop_with_customers().await;
    place_orders_while(&mut shop, async |shop| {
        shop.stack.system.kill("nats").await.unwrap();
        shop.stack.system.wipe_nats().unwrap();
        shop.stack.system.start("nats").await.unwrap();
    })
    .await;
    let begun = Instant::now();
    assert_eq!(
        shop.assert_settled(CLIENTS * ORDERS_EACH).await,
        100,
        "the money pays for this number of orders"
    );
    assert!(
        begun.elapsed() < Duration::from_secs(20),
        "recovery took {:?}, so the loss was not noticed at once",
        begun.elapsed()
    );
}

#[tokio::test]
async fn f24_the_broker_is_wiped_while_every_answer_is_in_flight() {
    // The worst moment: the money is debited and no answer has arrived.
    let mut shop = shop_with_customers().await;
    shop.stack.system.stop("payments").await.unwrap();
    for number in 0..20 {
        until_done(
            &shop.http,
            "/v1/orders",
            &json!({ "user_id": format!("user-{}", number % 4), "amount": 10 }),
        )
        .await;
    }
    let (orders, payments) = (
        shop.database("orders").await,
        shop.database("payments").await,
    );
    eventually("every order is published", SOON, async || {
        shop.all_published(&orders).await.then_some(())
    })
    .await;
    shop.stack.system.kill("orders").await.unwrap();
    shop.stack.system.start("payments").await.unwrap();
    eventually("every order is debited", SOON, async || {
        (shop.debits(&payments).await == 20).then_some(())
    })
    .await;
    eventually("every answer is published", SOON, async || {
        shop.all_published(&payments).await.then_some(())
    })
    .await;

    shop.stack.system.kill("nats").await.unwrap();
    shop.stack.system.wipe_nats().unwrap();
    shop.stack.system.start("nats").await.unwrap();
    shop.stack.system.start("orders").await.unwrap();
    let begun = Instant::now();
    assert_eq!(shop.assert_settled(20).await, 20);
    assert!(
        begun.elapsed() < Duration::from_secs(20),
        "recovery took {:?}, so the loss was not noticed at once",
        begun.elapsed()
    );
}

/// The broker restarts with an older copy of its data: it has lost what it acknowledged since
/// (F25).
#[tokio::test]
async fn f25_the_broker_is_restored_from_an_older_copy() {
    let mut shop = shop_with_customers().await;
    until_done(
        &shop.http,
        "/v1/orders",
        &json!({ "user_id": "user-0", "amount": 10 }),
    )
    .await;
    shop.assert_settled(1).await;
    shop.stack.system.kill("nats").await.unwrap();
    shop.stack.system.copy_nats().unwrap();
    shop.stack.system.start("nats").await.unwrap();
    place_orders_while(&mut shop, async |shop| {
        shop.stack.system.kill("nats").await.unwrap();
        shop.stack.system.roll_back_nats().unwrap();
        shop.stack.system.start("nats").await.unwrap();
    })
    .await;
    shop.assert_settled(1 + CLIENTS * ORDERS_EACH).await;
}

/// The broker freezes for longer than any client waits for it (F27).
#[tokio::test]
async fn f27_the_broker_is_frozen_for_six_seconds() {
    let mut shop = shop_with_customers().await;
    place_orders_while(&mut shop, async |shop| {
        shop.stack.system.pause("nats").unwrap();
        fault_lasts(Duration::from_secs(6)).await;
        shop.stack.system.resume("nats").unwrap();
    })
    .await;
    assert_eq!(shop.assert_settled(CLIENTS * ORDERS_EACH).await, 100);
}

/// Each service freezes for longer than the broker's ack wait, and resumes in the middle of its
/// work (F6, F35).
#[tokio::test]
async fn f35_each_service_is_frozen_for_two_seconds() {
    let mut shop = shop_with_customers().await;
    place_orders_while(&mut shop, async |shop| {
        for name in ["payments", "orders", "gateway"] {
            shop.stack.system.pause(name).unwrap();
            fault_lasts(Duration::from_secs(2)).await;
            shop.stack.system.resume(name).unwrap();
        }
    })
    .await;
    assert_eq!(shop.assert_settled(CLIENTS * ORDERS_EACH).await, 100);
}

/// PostgreSQL terminates every connection, several times (F10).
#[tokio::test]
async fn f10_all_database_connections_are_terminated_repeatedly() {
    let mut shop = shop_with_customers().await;
    let postgres = shop.database("postgres").await;
    place_orders_while(&mut shop, async |_| {
        for _ in 0..20 {
            let ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname IN ('orders', 'payments')";
            postgres.execute_unprepared(ended).await.unwrap();
            fault_lasts(Duration::from_millis(50)).await;
        }
    })
    .await;
    assert_eq!(shop.assert_settled(CLIENTS * ORDERS_EACH).await, 100);
}

/// An operator deletes a stream while orders run: messages and consumer are gone (F30).
#[tokio::test]
async fn f30_the_streams_are_deleted_under_load() {
    let mut shop = shop_with_customers().await;
    let ops = shop.operator().await;
    place_orders_while(&mut shop, async |_| {
        ops.jetstream().delete_stream("ORDERS").await.unwrap();
        ops.jetstream().delete_stream("PAYMENTS").await.unwrap();
    })
    .await;
    assert_eq!(shop.assert_settled(CLIENTS * ORDERS_EACH).await, 100);
}

/// Everything that can be pruned is pruned, and then the whole history is replayed twice: nothing
/// changes (F31, I1).
#[tokio::test]
async fn f31_everything_is_pruned_and_both_streams_are_replayed_twice() {
    let mut shop = shop_with_customers().await;
    place_orders_while(&mut shop, async |_| {}).await;
    assert_eq!(shop.assert_settled(CLIENTS * ORDERS_EACH).await, 100);
    let (orders, payments) = (
        shop.database("orders").await,
        shop.database("payments").await,
    );
    for db in [&orders, &payments] {
        db.execute_unprepared("DELETE FROM inbox; DELETE FROM outbox")
            .await
            .unwrap();
    }
    let before = shop.permanent_rows(&orders, &payments).await;

    let ops = shop.operator().await;
    let mut published = 0;
    for _ in 0..2 {
        for stream in ["ORDERS", "PAYMENTS"] {
            published += shop
                .replay_stream(&ops, stream, CLIENTS * ORDERS_EACH)
                .await;
        }
    }
    assert!(
        published >= 4 * CLIENTS * ORDERS_EACH,
        "{published} messages"
    );
    eventually("all replayed messages are acknowledged", SOON, async || {
        shop.all_acknowledged(&ops).await.then_some(())
    })
    .await;
    assert_eq!(
        shop.permanent_rows(&orders, &payments).await,
        before,
        "no row has changed"
    );
    assert!(shop.outbox_is_empty(&orders).await && shop.outbox_is_empty(&payments).await);
}

/// Outbox and inbox do not grow with the number of orders; decisions are kept.
#[tokio::test]
async fn outbox_and_inbox_are_pruned_and_decisions_are_kept() {
    let mut shop = with_customers(Shop::start_with(&[("GOZON_KEEP_SECONDS", "1")]).await).await;
    let (orders, payments) = (
        shop.database("orders").await,
        shop.database("payments").await,
    );
    for round in 1..=3 {
        place_orders_while(&mut shop, async |_| {}).await;
        shop.assert_settled(round * CLIENTS * ORDERS_EACH).await;
        for db in [&orders, &payments] {
            eventually("old rows are deleted", SOON, async || {
                shop.outbox_is_empty(db).await.then_some(())
            })
            .await;
        }
    }
    assert_eq!(shop.debits(&payments).await, 100);
}

/// The same under load: at any time there are only rows of the last seconds.
#[tokio::test]
async fn outbox_and_inbox_stay_bounded_under_load() {
    /// Twelve times the retention.
    const LOAD: Duration = Duration::from_secs(12);
    let shop = with_customers(Shop::start_with(&[("GOZON_KEEP_SECONDS", "1")]).await).await;
    let begun = Instant::now();
    let placed = AtomicUsize::new(0);
    let load = join_all((0..CLIENTS).map(async |client| {
        while begun.elapsed() < LOAD {
            until_done(
                &shop.http,
                "/v1/orders",
                &json!({ "user_id": format!("user-{}", client % 4), "amount": 1 }),
            )
            .await;
            placed.fetch_add(1, Ordering::Relaxed);
        }
    }));
    // The maximum number of rows per table.
    let tables = [
        "orders.outbox",
        "orders.inbox",
        "payments.outbox",
        "payments.inbox",
    ];
    let mut most = [0_i64; 4];
    let (orders, payments) = (
        shop.database("orders").await,
        shop.database("payments").await,
    );
    let mut samples = 0;
    let look = async {
        loop {
            for (most, table) in most.iter_mut().zip(tables) {
                let (name, table) = table.split_once('.').unwrap();
                let db = if name == "orders" { &orders } else { &payments };
                *most = (*most).max(count(db, table).await);
            }
            samples += 1;
        }
    };
    tokio::select! {
        _ = load => {}
        () = look => {}
    }
    let placed = placed.into_inner();
    shop.assert_settled(placed).await;
    // Each order adds two rows to the outbox of orders, and one to each of the others.
    for (most, made) in most.into_iter().zip([2 * placed, placed, placed, placed]) {
        assert!(
            samples > 10 && most > 0 && most < made as i64 / 2,
            "{most} of {made} rows existed at the same time, in {samples} samples"
        );
    }
}

async fn count(db: &DatabaseConnection, table: &str) -> i64 {
    let query =
        Statement::from_string(DbBackend::Postgres, format!("SELECT count(*) FROM {table}"));
    db.query_one_raw(query)
        .await
        .unwrap()
        .unwrap()
        .try_get_by_index(0)
        .unwrap()
}

/// Services are restarted gracefully, one after the other, under load (F44).
#[tokio::test]
async fn f44_services_are_restarted_one_after_the_other_under_load() {
    let mut shop = shop_with_customers().await;
    place_orders_while(&mut shop, async |shop| {
        for _ in 0..3 {
            for name in ["orders", "payments", "gateway"] {
                let begun = Instant::now();
                shop.stack.system.stop(name).await.unwrap();
                assert!(
                    begun.elapsed() < Duration::from_secs(10),
                    "{name} took {:?} to stop",
                    begun.elapsed()
                );
                shop.stack.system.start(name).await.unwrap();
            }
        }
    })
    .await;
    assert_eq!(shop.assert_settled(CLIENTS * ORDERS_EACH).await, 100);
}

#[tokio::test]
async fn f05_an_unavailable_service_is_named_and_the_other_one_keeps_working() {
    let mut shop = Shop::start().await;
    shop.customer("alice", 100).await;
    shop.stack.system.stop("payments").await.unwrap();
    for answer in [
        shop.http.get("/v1/accounts/alice").await.unwrap(),
        shop.http
            .post("/v1/accounts/alice/deposits", None, &json!({ "amount": 1 }))
            .await
            .unwrap(),
    ] {
        assert_eq!(
            (answer.status, answer.header("retry-after")),
            (503, Some("1"))
        );
        let detail = answer.json()["detail"].to_string();
        assert!(
            detail.contains("Payments Service temporarily unavailable."),
            "{detail}"
        );
    }
    // Orders are accepted while payments is down.
    let placed = shop
        .http
        .post(
            "/v1/orders",
            None,
            &json!({ "user_id": "alice", "amount": 60 }),
        )
        .await
        .unwrap();
    assert_eq!(placed.status, 201, "{}", placed.text());

    shop.stack.system.start("payments").await.unwrap();
    shop.stack.system.stop("orders").await.unwrap();
    let unavailable = shop.http.get("/v1/orders").await.unwrap();
    assert_eq!(unavailable.status, 503);
    assert!(
        unavailable
            .text()
            .contains("Orders Service temporarily unavailable."),
        "{}",
        unavailable.text()
    );
    eventually("the order is paid while orders is down", SOON, async || {
        (shop.balance("alice").await == 40).then_some(())
    })
    .await;
    assert_eq!(
        shop.http.get("/readyz").await.unwrap().status,
        200,
        "the gateway's health does not depend on other services"
    );

    shop.stack.system.start("orders").await.unwrap();
    assert_eq!(shop.assert_settled(1).await, 1);
}

#[tokio::test]
async fn parts_may_start_in_any_order() {
    let mut shop = Shop::start().await;
    shop.customer("alice", 100).await;
    for name in NAMES {
        shop.stack.system.kill(name).await.unwrap();
    }
    // Gateway first, database last: the reverse of the usual order.
    for name in ["gateway", "payments", "orders"] {
        shop.stack.system.spawn(name).unwrap();
        let http = Http::new(shop.stack.system.address(name));
        eventually("the service is alive", SOON, async || {
            http.get("/livez")
                .await
                .ok()
                .filter(|answer| answer.status == 200)
        })
        .await;
    }
    shop.stack.system.start("nats").await.unwrap();
    eventually("the database is running", SOON, async || {
        shop.stack.system.start("postgres").await.ok()
    })
    .await;
    for name in ["orders", "payments"] {
        shop.stack.system.until_ready(name).await.unwrap();
    }
    let ended = join_all((0..4).map(|_| shop.order("alice", 30))).await;
    assert_eq!(
        ended
            .iter()
            .filter(|(status, _)| status == "FINISHED")
            .count(),
        3
    );
    assert_eq!(shop.assert_settled(4).await, 3);
}

/// The stream has space for a few messages, and payments is down: most requests are evicted before
/// they are read.
#[tokio::test]
async fn f18_a_full_stream_evicts_requests_and_every_order_still_ends() {
    let shop = Shop::start_with(&[
        ("GOZON_STREAM_MAX_BYTES", "24000"),
        ("GOZON_ASK_AGAIN_MS", "1000"),
    ])
    .await;
    let mut shop = with_customers(shop).await;
    shop.stack.system.stop("payments").await.unwrap();
    place_orders_while(&mut shop, async |_| {}).await;
    let orders = shop.database("orders").await;
    eventually("all events are published", SOON, async || {
        shop.all_published(&orders).await.then_some(())
    })
    .await;
    let held = shop
        .operator()
        .await
        .jetstream()
        .get_stream("ORDERS")
        .await
        .unwrap()
        .cached_info()
        .state
        .messages;
    assert!(held < 60, "the stream holds {held} messages");
    shop.stack.system.start("payments").await.unwrap();
    assert_eq!(shop.assert_settled(CLIENTS * ORDERS_EACH).await, 100);
}

/// No order is rejected while the broker is down, and all of them become final afterwards.
#[tokio::test]
async fn f23_the_broker_is_unavailable_for_ten_seconds() {
    let mut shop = shop_with_customers().await;
    place_orders_while(&mut shop, async |shop| {
        shop.stack.system.stop("nats").await.unwrap();
        fault_lasts(Duration::from_secs(10)).await;
        let placed = shop
            .http
            .post(
                "/v1/orders",
                None,
                &json!({ "user_id": "nobody", "amount": 1 }),
            )
            .await
            .unwrap();
        assert_eq!(placed.status, 201, "{}", placed.text());
        shop.stack.system.start("nats").await.unwrap();
    })
    .await;
    assert_eq!(shop.assert_settled(CLIENTS * ORDERS_EACH + 1).await, 100);
}

/// Only the database of payments is down: no message counts as poison, however often it is retried.
#[tokio::test]
async fn f39_the_database_of_payments_is_unavailable_for_ten_seconds() {
    let mut shop = shop_with_customers().await;
    let server = shop.database("postgres").await;
    place_orders_while(&mut shop, async |_| {
        let disallow = "ALTER DATABASE payments ALLOW_CONNECTIONS false";
        server.execute_unprepared(disallow).await.unwrap();
        let end =
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'payments'";
        server.execute_unprepared(end).await.unwrap();
        fault_lasts(Duration::from_secs(10)).await;
        server
            .execute_unprepared("ALTER DATABASE payments ALLOW_CONNECTIONS true")
            .await
            .unwrap();
    })
    .await;
    assert_eq!(shop.assert_settled(CLIENTS * ORDERS_EACH).await, 100);
}
