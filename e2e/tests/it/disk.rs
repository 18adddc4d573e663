//! No room on the disk: nothing is accepted that is not stored, and all goes on when there is room again.

use serde_json::json;
use stack::testing::{SmallDisk, TestStack, eventually};

use crate::faults::{CLIENTS, ORDERS_EACH, shop_while, with_customers};
use crate::shop::{SOON, Shop};

/// A shop one part of which keeps its data on a small disk. Nobody but root can make one; then the test says so.
async fn shop_on_a_small_disk(part: &str, megabytes: u32) -> Option<(Shop, SmallDisk)> {
    let mut stack = TestStack::prepare(Vec::new()).await.unwrap();
    let disk = match SmallDisk::mount(megabytes) {
        Ok(disk) => disk,
        Err(error) => {
            eprintln!("not tested here: {error:#}");
            return None;
        }
    };
    let place = stack.system.place();
    disk.take_in(&if part == "postgres" { place.postgres_data() } else { place.nats_data() }).unwrap();
    stack.system.start_all(|_, _| {}).await.unwrap();
    Some((with_customers(Shop::on(stack)).await, disk))
}

#[tokio::test]
async fn f12_the_disk_of_the_database_is_full() {
    let Some((mut shop, disk)) = shop_on_a_small_disk("postgres", 400).await else { return };
    shop_while(&mut shop, async |shop| {
        disk.fill().unwrap();
        let refused = eventually("an order is refused", SOON, async || {
            let order = json!({ "user_id": "user-0", "amount": 1_000_000, "description": "x".repeat(500) });
            let answer = shop.http.post("/v1/orders", None, &order).await.ok()?;
            (answer.status != 201).then_some(answer)
        })
        .await;
        assert_eq!((refused.status, refused.header("content-type")), (503, Some("application/problem+json")));
        disk.free().unwrap();
        // It may have given up: whoever runs it starts it again.
        if shop.stack.system.ended("postgres").is_some() {
            eventually("it is there again", SOON, async || shop.stack.system.start("postgres").await.ok()).await;
        }
    })
    .await;
    // Some of the others may have been accepted too; they are too dear for anyone.
    let placed = shop.placed().await;
    assert!(placed >= CLIENTS * ORDERS_EACH, "{placed}");
    assert_eq!(shop.assert_settled(placed).await, 100);
}

#[tokio::test]
async fn f26_the_disk_of_the_broker_is_full() {
    let Some((mut shop, disk)) = shop_on_a_small_disk("nats", 64).await else { return };
    shop_while(&mut shop, async |shop| {
        disk.fill().unwrap();
        let orders = shop.database("orders").await;
        eventually("an event cannot be published", SOON, async || shop.something_was_refused(&orders).await.then_some(())).await;
        disk.free().unwrap();
        // The server switches its streams off for good: whoever runs it starts it again.
        shop.stack.system.stop("nats").await.unwrap();
        shop.stack.system.start("nats").await.unwrap();
    })
    .await;
    assert_eq!(shop.assert_settled(CLIENTS * ORDERS_EACH).await, 100);
}
