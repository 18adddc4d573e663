//! The operator's API: the backlog, and dead letters.

use async_nats::HeaderMap;
use bytes::Bytes;
use sea_orm::ConnectionTrait as _;
use serde_json::{Value, json};
use shared_contracts::{Event as _, OrderPlaced, PaymentSettled, SPEC_VERSION, header};
use stack::testing::eventually;
use uuid::Uuid;

use crate::shop::{SOON, Shop};

async fn post(shop: &Shop, path: &str) -> (u16, Value) {
    let answer = shop
        .http
        .request("POST", path, &[], Bytes::new())
        .await
        .unwrap();
    (answer.status, answer.json())
}

async fn publish(shop: &Shop, subject: &'static str, kind: &str, order_id: Uuid, body: &Value) {
    let mut headers = HeaderMap::new();
    headers.insert(header::SPEC_VERSION, SPEC_VERSION);
    headers.insert(header::ID, Uuid::now_v7().to_string());
    headers.insert(header::TYPE, kind);
    headers.insert(header::SUBJECT, order_id.to_string());
    let operator = shop.operator().await;
    operator
        .jetstream()
        .publish_with_headers(subject, headers, body.to_string().into())
        .await
        .unwrap()
        .await
        .unwrap();
}

async fn dead_letters(shop: &Shop, number: usize) -> Vec<Value> {
    eventually("the dead letters are stored", SOON, async || {
        let items = shop.http.get("/v1/ops/dead-letters").await.unwrap().json()["items"]
            .as_array()
            .unwrap()
            .clone();
        (items.len() == number).then_some(items)
    })
    .await
}

#[tokio::test]
async fn an_operator_sees_the_backlog_and_replays_a_dead_letter() {
    let mut shop = Shop::start().await;
    shop.customer("alice", 100).await;
    assert_eq!(shop.order("alice", 10).await.0, "FINISHED");
    let flow = eventually("nothing is in progress", SOON, async || {
        let flow = shop.http.get("/v1/ops/flow").await.unwrap().json();
        let idle = |service: &str| {
            flow[service]["outbox_pending"] == 0 && flow[service]["consumer"]["ack_pending"] == 0
        };
        // The number of NEW orders is from the last look for orders to ask again about.
        let settled = flow["orders"]["new_orders"] == 0;
        (settled && idle("orders") && idle("payments")).then_some(flow)
    })
    .await;
    assert_eq!(flow["orders"]["poison"], 0);
    assert_eq!(flow["orders"]["consumer"]["name"], "orders-payment-settled");
    assert_eq!(
        flow["payments"]["consumer"],
        json!({ "name": "payments-order-placed", "pending": 0, "ack_pending": 0, "redelivered": 0 })
    );
    assert_eq!(flow["unavailable"], json!([]));

    // An answer for an unknown order (as after a restored database), and a malformed one.
    let unknown = Uuid::now_v7();
    let answer = json!({ "order_id": unknown, "user_id": "alice", "amount": 7, "outcome": "declined", "reason": "no_account" });
    publish(
        &shop,
        PaymentSettled::SUBJECT,
        PaymentSettled::TYPE,
        unknown,
        &answer,
    )
    .await;
    dead_letters(&shop, 1).await;
    publish(
        &shop,
        OrderPlaced::SUBJECT,
        "gozon.order.placed.v9",
        Uuid::now_v7(),
        &json!({}),
    )
    .await;
    let all = dead_letters(&shop, 2).await;
    let (poison, quarantined) = (&all[0], &all[1]);
    assert_eq!(
        (&poison["service"], &poison["kind"], &poison["waits"]),
        (&json!("payments"), &json!("poison"), &json!(true))
    );
    assert!(
        poison["cause"]
            .as_str()
            .unwrap()
            .contains("gozon.order.placed.v9"),
        "{poison}"
    );
    assert!(
        poison["headers"]
            .as_str()
            .unwrap()
            .contains("ce-type: gozon.order.placed.v9\n"),
        "{poison}"
    );
    assert_eq!(
        (&quarantined["service"], &quarantined["kind"]),
        (&json!("orders"), &json!("quarantine"))
    );
    assert_eq!(
        (
            &quarantined["order_id"],
            quarantined["payload"].as_str().unwrap()
        ),
        (&json!(unknown), answer.to_string().as_str())
    );

    // Page by page.
    let page = shop
        .http
        .get("/v1/ops/dead-letters?limit=1")
        .await
        .unwrap()
        .json();
    assert_eq!(
        (
            page["items"].as_array().unwrap().len(),
            &page["items"][0]["id"]
        ),
        (1, &poison["id"])
    );
    let cursor = page["next_cursor"].as_str().unwrap();
    let rest = shop
        .http
        .get(&format!("/v1/ops/dead-letters?limit=1&cursor={cursor}"))
        .await
        .unwrap()
        .json();
    assert_eq!(
        (&rest["items"][0]["id"], &rest["next_cursor"]),
        (&quarantined["id"], &Value::Null)
    );

    // A replay is rejected as before, says why, and the dead letter stays.
    for (letter, outcome) in [(poison, "poison"), (quarantined, "quarantine")] {
        let path = format!(
            "/v1/ops/dead-letters/{}/replay",
            letter["id"].as_str().unwrap()
        );
        let (status, replay) = post(&shop, &format!("{path}?dry_run=true")).await;
        assert_eq!(
            (status, &replay["outcome"], &replay["dry_run"]),
            (200, &json!(outcome), &json!(true)),
            "{replay}"
        );
        let (_, replay) = post(&shop, &path).await;
        assert_eq!(
            (&replay["outcome"], &replay["dry_run"]),
            (&json!(outcome), &json!(false))
        );
    }
    let again = dead_letters(&shop, 2).await;
    assert!(
        again
            .iter()
            .all(|letter| letter["waits"] == true && letter["replays"] == 1),
        "{again:?}"
    );

    // Now the order exists. A dry run shows the effect; a replay has it once. The request counts as
    // published just now, so that the order is not re-asked.
    let orders = shop.database("orders").await;
    let event = Uuid::now_v7();
    let restored = format!(
        "INSERT INTO orders (id, user_id, amount, description, idempotency_key, request_hash, placed_event_id, created_at, updated_at)
         VALUES ('{unknown}', 'alice', 7, '', 'key', '', '{event}', now(), now());
         INSERT INTO outbox (event_id, n, subject, headers, payload, published_at, stream_sequence)
         VALUES ('{event}', 0, '{}', '', '{{}}', now(), 1)",
        OrderPlaced::SUBJECT
    );
    orders.execute_unprepared(&restored).await.unwrap();
    let path = format!(
        "/v1/ops/dead-letters/{}/replay",
        quarantined["id"].as_str().unwrap()
    );
    let (_, foreseen) = post(&shop, &format!("{path}?dry_run=true")).await;
    assert_eq!(
        (&foreseen["outcome"], &foreseen["detail"]),
        (
            &json!("applied"),
            &json!("The order ends CANCELLED: no_account.")
        )
    );
    assert_eq!(
        shop.http
            .get(&format!("/v1/orders/{unknown}"))
            .await
            .unwrap()
            .json()["status"],
        "NEW"
    );
    let (_, applied) = post(&shop, &path).await;
    assert_eq!(applied["outcome"], "applied");
    assert_eq!(
        shop.http
            .get(&format!("/v1/orders/{unknown}"))
            .await
            .unwrap()
            .json()["status"],
        "CANCELLED"
    );
    assert_eq!(post(&shop, &path).await.1["outcome"], "nothing_to_do");
    let waits: Vec<Value> = dead_letters(&shop, 2)
        .await
        .iter()
        .map(|letter| letter["waits"].clone())
        .collect();
    assert_eq!(waits, [json!(true), json!(false)]);
    eventually("its final event is published", SOON, async || {
        shop.all_published(&orders).await.then_some(())
    })
    .await;

    for (method, path, status, code) in [
        (
            "POST",
            "/v1/ops/dead-letters/7/replay",
            404,
            "dead_letter_not_found",
        ),
        (
            "POST",
            "/v1/ops/dead-letters/01933f3c-7d5a-7b60-9d6f-3f0b4b1f2a11/replay",
            404,
            "dead_letter_not_found",
        ),
        (
            "POST",
            "/v1/ops/dead-letters/01933f3c-7d5a-7b60-9d6f-3f0b4b1f2a11/replay?dry_run=1",
            422,
            "validation_failed",
        ),
        (
            "GET",
            "/v1/ops/dead-letters?limit=0",
            422,
            "validation_failed",
        ),
        (
            "GET",
            "/v1/ops/dead-letters?cursor=x",
            422,
            "validation_failed",
        ),
    ] {
        let answer = shop
            .http
            .request(method, path, &[], Bytes::new())
            .await
            .unwrap();
        assert_eq!(
            (answer.status, answer.json()["code"].as_str()),
            (status, Some(code)),
            "{path}"
        );
    }

    // With one service down, the other one is still shown.
    shop.stack.system.stop("payments").await.unwrap();
    let flow = shop.http.get("/v1/ops/flow").await.unwrap();
    assert_eq!(
        (
            flow.status,
            &flow.json()["payments"],
            &flow.json()["unavailable"]
        ),
        (200, &Value::Null, &json!(["payments"]))
    );
    let rest = shop.http.get("/v1/ops/dead-letters").await.unwrap().json();
    assert_eq!(
        (
            rest["items"].as_array().unwrap().len(),
            &rest["unavailable"]
        ),
        (1, &json!(["payments"]))
    );
}
