//! Everything is killed at some time, and nothing is lost, doubled or left hanging.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::json;
use stack::NAMES;
use stack::http::Http;
use stack::testing::eventually;

use crate::shop::{SOON, Shop, until_done};

const CLIENTS: usize = 8;
const ORDERS_EACH: usize = 15;

/// Orders from several clients at once. `when` runs when a third of them is accepted.
async fn shop_while(shop: &mut Shop, when: impl AsyncFnOnce(&mut Shop)) {
    let total = CLIENTS * ORDERS_EACH;
    let (http, accepted) = (shop.http.clone(), AtomicUsize::new(0));
    let clients = join_all((0..CLIENTS).map(async |client| {
        for number in 0..ORDERS_EACH {
            let body = json!({ "user_id": format!("user-{}", (client + number) % 4), "amount": 10 });
            until_done(&http, "/v1/orders", &body).await;
            accepted.fetch_add(1, Ordering::Relaxed);
        }
    }));
    let fault = async {
        eventually("a third is accepted", SOON, async || (accepted.load(Ordering::Relaxed) >= total / 3).then_some(())).await;
        when(shop).await;
    };
    tokio::join!(clients, fault);
}

/// Four customers with money for 25 orders each, where 30 are placed for each.
async fn shop_with_customers() -> Shop {
    let shop = Shop::open().await;
    for user in 0..4 {
        shop.customer(&format!("user-{user}"), 250).await;
    }
    shop
}

async fn killed_in_the_middle(name: &str) {
    let mut shop = shop_with_customers().await;
    shop_while(&mut shop, async |shop| {
        shop.stack.system.kill(name).await.unwrap();
        // PostgreSQL may need a second try while children of the killed one are still going.
        eventually("it is there again", SOON, async || shop.stack.system.start(name).await.ok()).await;
    })
    .await;
    assert_eq!(shop.assert_settled(CLIENTS * ORDERS_EACH).await, 100, "as many as there was money for");
    for user in 0..4 {
        assert_eq!(shop.balance(&format!("user-{user}")).await, 0);
    }
}

#[tokio::test]
async fn orders_killed_in_the_middle() {
    killed_in_the_middle("orders").await;
}

#[tokio::test]
async fn payments_killed_in_the_middle() {
    killed_in_the_middle("payments").await;
}

#[tokio::test]
async fn the_gateway_killed_in_the_middle() {
    killed_in_the_middle("gateway").await;
}

#[tokio::test]
async fn the_broker_killed_in_the_middle() {
    killed_in_the_middle("nats").await;
}

#[tokio::test]
async fn the_database_killed_in_the_middle() {
    killed_in_the_middle("postgres").await;
}

#[tokio::test]
async fn the_broker_wiped_in_the_middle() {
    // Every message and every consumer is gone, acknowledged or not. Nobody does anything about it.
    let mut shop = shop_with_customers().await;
    shop_while(&mut shop, async |shop| {
        shop.stack.system.kill("nats").await.unwrap();
        shop.stack.system.wipe_nats().unwrap();
        shop.stack.system.start("nats").await.unwrap();
    })
    .await;
    let begun = Instant::now();
    assert_eq!(shop.assert_settled(CLIENTS * ORDERS_EACH).await, 100, "as many as there was money for");
    assert!(begun.elapsed() < Duration::from_secs(20), "it took {:?}, longer than noticing the loss takes", begun.elapsed());
}

#[tokio::test]
async fn the_broker_wiped_while_every_answer_is_under_way() {
    // The worst moment: money is debited, and no answer has arrived.
    let mut shop = shop_with_customers().await;
    shop.stack.system.stop("payments").await.unwrap();
    for number in 0..20 {
        until_done(&shop.http, "/v1/orders", &json!({ "user_id": format!("user-{}", number % 4), "amount": 10 })).await;
    }
    let (orders, payments) = (shop.database("orders").await, shop.database("payments").await);
    eventually("every order is published", SOON, async || shop.nothing_waits(&orders).await.then_some(())).await;
    shop.stack.system.kill("orders").await.unwrap();
    shop.stack.system.start("payments").await.unwrap();
    eventually("every order is debited", SOON, async || (shop.debits(&payments).await == 20).then_some(())).await;
    eventually("every answer is published", SOON, async || shop.nothing_waits(&payments).await.then_some(())).await;

    shop.stack.system.kill("nats").await.unwrap();
    shop.stack.system.wipe_nats().unwrap();
    shop.stack.system.start("nats").await.unwrap();
    shop.stack.system.start("orders").await.unwrap();
    let begun = Instant::now();
    assert_eq!(shop.assert_settled(20).await, 20);
    assert!(begun.elapsed() < Duration::from_secs(20), "it took {:?}, longer than noticing the loss takes", begun.elapsed());
}

#[tokio::test]
async fn a_service_that_is_away_is_named_and_the_other_goes_on() {
    let mut shop = Shop::open().await;
    shop.customer("alice", 100).await;
    shop.stack.system.stop("payments").await.unwrap();
    for answer in [
        shop.http.get("/v1/accounts/alice").await.unwrap(),
        shop.http.post("/v1/accounts/alice/deposits", None, &json!({ "amount": 1 })).await.unwrap(),
    ] {
        assert_eq!((answer.status, answer.header("retry-after")), (503, Some("1")));
        assert_eq!(answer.json()["detail"], "Payments Service temporarily unavailable.");
    }
    // Orders are taken while nobody can decide them.
    let placed = shop.http.post("/v1/orders", None, &json!({ "user_id": "alice", "amount": 60 })).await.unwrap();
    assert_eq!(placed.status, 201, "{}", placed.text());

    shop.stack.system.start("payments").await.unwrap();
    shop.stack.system.stop("orders").await.unwrap();
    let away = shop.http.get("/v1/orders").await.unwrap();
    assert_eq!((away.status, &away.json()["detail"]), (503, &json!("Orders Service temporarily unavailable.")));
    eventually("the order is paid while orders is away", SOON, async || (shop.balance("alice").await == 40).then_some(())).await;
    assert_eq!(shop.http.get("/readyz").await.unwrap().status, 200, "the gateway's health does not depend on others");

    shop.stack.system.start("orders").await.unwrap();
    assert_eq!(shop.assert_settled(1).await, 1);
}

#[tokio::test]
async fn it_starts_in_any_order() {
    let mut shop = Shop::open().await;
    shop.customer("alice", 100).await;
    for name in NAMES {
        shop.stack.system.kill(name).await.unwrap();
    }
    // Doors first, foundations last: the opposite of what would be comfortable.
    for name in ["gateway", "payments", "orders"] {
        shop.stack.system.spawn(name).unwrap();
        let http = Http::new(shop.stack.system.address(name));
        eventually("it lives", SOON, async || http.get("/livez").await.ok().filter(|answer| answer.status == 200)).await;
    }
    shop.stack.system.start("nats").await.unwrap();
    eventually("the database is there", SOON, async || shop.stack.system.start("postgres").await.ok()).await;
    for name in ["orders", "payments"] {
        shop.stack.system.until_ready(name).await.unwrap();
    }
    let ended = join_all((0..4).map(|_| shop.order("alice", 30))).await;
    assert_eq!(ended.iter().filter(|(status, _)| status == "FINISHED").count(), 3);
    assert_eq!(shop.assert_settled(4).await, 3);
}
