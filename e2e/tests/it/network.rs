//! A faulty network between the parts, and lost answers.

use std::time::{Duration, Instant};

use e2e::SHORT_TIMERS;
use futures_util::future::join_all;
use serde_json::json;
use stack::proxy::Cut;
use stack::seed::Seed;
use stack::testing::{TestStack, eventually, own_programs};
use stack::{NAMES, Proxies};

use crate::shop::{SOON, Shop, fault_lasts};

/// A dead connection is detected and replaced within this, also on a busy machine.
const NOTICED_WITHIN: Duration = Duration::from_secs(40);
/// The gateway's timeout with some margin.
const ANSWERED_WITHIN: Duration = Duration::from_secs(10);

async fn shop_behind_proxies() -> (Shop, Proxies) {
    let environment = SHORT_TIMERS
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec();
    let mut seed = Seed::new(1);
    let (stack, proxies) =
        TestStack::start_behind_proxies(&own_programs().unwrap(), environment, &mut seed)
            .await
            .unwrap();
    (Shop::with_stack(stack), proxies)
}

/// Places one order while `cut` loses messages; it must have fired `times` times.
async fn order_while_lost(
    shop: &Shop,
    proxies: &Proxies,
    service: &str,
    part: &str,
    cut: Cut,
    times: usize,
) {
    let proxy = proxies.between(service, part);
    proxy.arm(cut, times);
    assert_eq!(
        shop.order("alice", 10).await,
        ("FINISHED".to_owned(), None),
        "{service}, {cut:?}"
    );
    // An ack, or a relay's update, may come after the order is final.
    let fired = async || (proxy.fired(cut) == times as u64).then_some(());
    eventually(&format!("{cut:?} at {service} has happened"), SOON, fired).await;
}

/// COMMIT reached the server or not; the client sees a closed connection in both cases (F8).
#[tokio::test]
async fn f08_a_commit_whose_outcome_is_unknown_happens_exactly_once() {
    let (shop, proxies) = shop_behind_proxies().await;
    shop.customer("alice", 1000).await;
    let places = [
        ("orders", "INSERT INTO orders"),
        ("orders", "UPDATE outbox o SET published_at"),
        ("payments", "INSERT INTO payments"),
        ("payments", "UPDATE outbox o SET published_at"),
        ("orders", "UPDATE orders o SET status"),
    ];
    let mut orders = 0;
    for (service, after) in places {
        for cut in [Cut::CommitAnswer { after }, Cut::CommitRequest { after }] {
            order_while_lost(&shop, &proxies, service, "postgres", cut, 1).await;
            orders += 1;
        }
    }
    assert_eq!(shop.assert_settled(orders).await, orders);
    assert_eq!(
        shop.balance("alice").await,
        1000 - 10 * i64::try_from(orders).unwrap(),
        "each order is debited exactly once"
    );

    let after = "SET balance = balance + $2";
    for cut in [Cut::CommitAnswer { after }, Cut::CommitRequest { after }] {
        let before = shop.balance("alice").await;
        proxies.between("payments", "postgres").arm(cut, 1);
        let paid_in = shop
            .until_done("/v1/accounts/alice/deposits", &json!({ "amount": 5 }))
            .await;
        assert_eq!(paid_in.json()["balance"], before + 5);
        assert_eq!(
            (
                shop.balance("alice").await,
                proxies.between("payments", "postgres").fired(cut)
            ),
            (before + 5, 1)
        );
    }
}

/// The service's own retries fail too: the client is told that the outcome is unknown, and a retry
/// under the same key resolves it (I9).
#[tokio::test]
async fn f08_an_unknown_outcome_is_reported_and_a_retry_under_its_key_resolves_it() {
    let (shop, proxies) = shop_behind_proxies().await;
    shop.customer("alice", 100).await;
    let proxy = proxies.between("orders", "postgres");
    let cut = Cut::CommitAnswer {
        after: "INSERT INTO orders",
    };
    proxy.arm(cut, 1000);
    let body = json!({ "user_id": "alice", "amount": 10 });
    let answer = shop
        .http
        .post("/v1/orders", Some("lamp"), &body)
        .await
        .unwrap();
    let answer_body = answer.json();
    assert_eq!(
        (
            answer.status,
            &answer_body["outcome"],
            &answer_body["idempotency_key"]
        ),
        (503, &json!("unknown"), &json!("lamp")),
        "{answer_body}"
    );
    assert!(
        proxy.fired(cut) >= 2,
        "the service retried, and no attempt was answered"
    );
    proxy.disarm();
    let found_out = eventually("the retry is answered", SOON, async || {
        shop.http
            .post("/v1/orders", Some("lamp"), &body)
            .await
            .ok()
            .filter(|answer| answer.status == 201)
    })
    .await;
    assert_eq!(
        found_out.header("idempotency-replayed"),
        Some("true"),
        "the first attempt had succeeded"
    );
    assert_eq!(shop.assert_settled(1).await, 1);
}

/// PubAcks, acks and deliveries are lost (F18, F36).
#[tokio::test]
async fn f36_a_lost_puback_ack_or_delivery_only_causes_delay() {
    let (shop, proxies) = shop_behind_proxies().await;
    shop.customer("alice", 1000).await;
    let mut orders = 0;
    for service in ["orders", "payments"] {
        for (cut, times) in [
            (Cut::PubAck, 1),
            (Cut::PubAck, 3),
            (Cut::Ack, 2),
            (Cut::Delivery, 2),
        ] {
            let fired = proxies.between(service, "nats").fired(cut);
            proxies.between(service, "nats").arm(cut, times);
            assert_eq!(
                shop.order("alice", 10).await,
                ("FINISHED".to_owned(), None),
                "{service}, {cut:?}"
            );
            eventually("the message was lost", SOON, async || {
                (proxies.between(service, "nats").fired(cut) == fired + times as u64).then_some(())
            })
            .await;
            orders += 1;
        }
    }
    assert_eq!(shop.assert_settled(orders).await, orders);
    assert_eq!(
        shop.balance("alice").await,
        1000 - 10 * i64::try_from(orders).unwrap()
    );
}

/// Connections are black-holed: nothing is forwarded, nothing is closed (F48).
#[tokio::test]
async fn f48_black_holed_connections_are_detected_and_replaced() {
    let (shop, proxies) = shop_behind_proxies().await;
    shop.customer("alice", 1000).await;
    let mut orders = 0;
    for (service, part) in [
        ("orders", "postgres"),
        ("payments", "postgres"),
        ("orders", "nats"),
        ("payments", "nats"),
    ] {
        // Use each connection, so that data is in flight on each of them.
        assert_eq!(shop.order("alice", 10).await.0, "FINISHED");
        proxies.between(service, part).black_hole();
        proxies.between(service, part).clear_faults();
        let begun = Instant::now();
        let ended = async || {
            let order = shop.order("alice", 10).await;
            (order.0 == "FINISHED").then_some(())
        };
        tokio::time::timeout(
            NOTICED_WITHIN,
            eventually("an order becomes final", SOON, async || ended().await),
        )
        .await
        .unwrap_or_else(|_| {
            panic!(
                "{service} still hangs at {part} after {:?}",
                begun.elapsed()
            )
        });
        orders += 2;
    }
    assert!(shop.assert_settled(orders).await >= orders);
}

/// While the connection to a database is black-holed, requests are answered, and the other service
/// keeps working (F48).
#[tokio::test]
async fn f48_no_request_hangs_while_a_connection_is_black_holed() {
    let (shop, proxies) = shop_behind_proxies().await;
    shop.customer("alice", 1000).await;
    for (service, request, body) in [
        (
            "orders",
            "/v1/orders",
            json!({ "user_id": "alice", "amount": 10 }),
        ),
        (
            "payments",
            "/v1/accounts/alice/deposits",
            json!({ "amount": 10 }),
        ),
    ] {
        let proxy = proxies.between(service, "postgres");
        proxy.black_hole();
        let begun = Instant::now();
        for answer in join_all((0..5).map(|_| shop.http.post(request, None, &body))).await {
            let answer = answer.unwrap();
            assert_eq!(answer.status, 503, "{}", answer.text());
        }
        assert!(
            begun.elapsed() < ANSWERED_WITHIN,
            "{service} took {:?} to report that its database is down",
            begun.elapsed()
        );
        proxy.clear_faults();
        let healed = async || {
            shop.http
                .post(request, None, &body)
                .await
                .ok()
                .filter(|answer| answer.status == 201)
        };
        tokio::time::timeout(
            NOTICED_WITHIN,
            eventually("the service works again", SOON, async || healed().await),
        )
        .await
        .unwrap();
    }
    // Placing an order does not need the broker.
    proxies.to("nats").for_each(stack::proxy::Proxy::black_hole);
    let placed = shop
        .http
        .post(
            "/v1/orders",
            None,
            &json!({ "user_id": "alice", "amount": 10 }),
        )
        .await
        .unwrap();
    assert_eq!(placed.status, 201, "{}", placed.text());
    proxies
        .to("nats")
        .for_each(stack::proxy::Proxy::clear_faults);
    let path = format!(
        "/v1/orders/{}?wait=30",
        placed.json()["id"].as_str().unwrap()
    );
    eventually("the order is paid", SOON, async || {
        shop.http
            .get(&path)
            .await
            .ok()
            .filter(|order| order.json()["status"] == "FINISHED")
    })
    .await;
}

/// Every connection is slow: delayed, in single bytes, 10 kB/s (F47).
#[tokio::test]
async fn f47_a_slow_network_only_causes_delay() {
    let (shop, proxies) = shop_behind_proxies().await;
    shop.customer("alice", 1000).await;
    let mut orders = 0;
    for (delay, piece) in [
        (Duration::from_millis(200), 0),
        (Duration::ZERO, 1),
        (Duration::from_millis(100), 512),
    ] {
        proxies.all().for_each(|proxy| proxy.slow(delay, piece));
        let ended = join_all((0..10).map(|_| shop.order("alice", 10))).await;
        assert_eq!(
            ended
                .iter()
                .filter(|(status, _)| status == "FINISHED")
                .count(),
            10,
            "{delay:?}, {piece}: {ended:?}"
        );
        orders += 10;
    }
    proxies.all().for_each(stack::proxy::Proxy::clear_faults);
    assert_eq!(shop.assert_settled(orders).await, orders);
    assert_eq!(
        shop.balance("alice").await,
        1000 - 10 * i64::try_from(orders).unwrap()
    );
}

/// All connections are blocked one after the other, then cut, and reopened in another order (F49).
#[tokio::test]
async fn f49_connections_are_blocked_one_by_one_and_reopened_in_another_order() {
    let (shop, proxies) = shop_behind_proxies().await;
    shop.customer("alice", 1000).await;
    let mut seed = Seed::new(49);
    let body = json!({ "user_id": "alice", "amount": 10 });
    let orders = join_all((0..40).map(|_| shop.until_done("/v1/orders", &body)));
    let swizzle = async {
        for _ in 0..3 {
            let mut proxies: Vec<_> = proxies.all().cloned().collect();
            seed.shuffle(&mut proxies);
            for proxy in &proxies {
                proxy.hold();
                fault_lasts(Duration::from_millis(100)).await;
            }
            proxies.iter().for_each(stack::proxy::Proxy::cut);
            seed.shuffle(&mut proxies);
            for proxy in &proxies {
                proxy.clear_faults();
                fault_lasts(Duration::from_millis(100)).await;
            }
        }
    };
    tokio::join!(orders, swizzle);
    assert_eq!(shop.assert_settled(40).await, 40);
    assert_eq!(shop.balance("alice").await, 600);
}

/// A power cut: everything is killed at once under load, and restarted in any order (F52).
#[tokio::test]
async fn f52_all_processes_are_killed_at_once() {
    let (mut shop, _edges) = shop_behind_proxies().await;
    shop.customer("alice", 1000).await;
    let http = shop.http.clone();
    let mut seed = Seed::new(52);
    for round in 1..=2 {
        let body = json!({ "user_id": "alice", "amount": 10 });
        let orders = join_all((0..40).map(|_| crate::shop::until_done(&http, "/v1/orders", &body)));
        let power_cut = async {
            fault_lasts(Duration::from_millis(50)).await;
            let mut names = NAMES;
            for name in names {
                shop.stack.system.kill(name).await.unwrap();
            }
            seed.shuffle(&mut names);
            for name in names {
                shop.stack.system.spawn(name).unwrap();
            }
            for name in names {
                // PostgreSQL may need a second attempt while processes of the killed server are
                // exiting.
                eventually("it is running again", SOON, async || {
                    if shop.stack.system.pid(name).is_none() {
                        shop.stack.system.spawn(name).unwrap();
                    }
                    shop.stack.system.until_ready(name).await.ok()
                })
                .await;
            }
        };
        tokio::join!(orders, power_cut);
        assert_eq!(shop.assert_settled(round * 40).await, round * 40);
    }
    assert_eq!(shop.balance("alice").await, 200);
}
