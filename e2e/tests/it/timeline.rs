//! The timeline of an order.

use sea_orm::ConnectionTrait as _;
use serde_json::{Value, json};
use stack::testing::eventually;

use crate::shop::{SOON, Shop};

fn steps(timeline: &Value) -> Vec<String> {
    let steps = timeline["steps"].as_array().unwrap().iter();
    steps
        .map(|step| {
            format!(
                "{} {}",
                step["service"].as_str().unwrap(),
                step["step"].as_str().unwrap()
            )
        })
        .collect()
}

#[tokio::test]
async fn a_timeline_shows_every_step_and_every_ignored_duplicate() {
    let mut shop = Shop::start().await;
    shop.customer("alice", 100).await;
    let placed = shop
        .until_done("/v1/orders", &json!({ "user_id": "alice", "amount": 30 }))
        .await
        .json();
    let path = format!("/v1/orders/{}/timeline", placed["id"].as_str().unwrap());
    let whole = async |number: usize| {
        eventually("the timeline has all steps", SOON, async || {
            let timeline = shop.http.get(&path).await.unwrap().json();
            (timeline["steps"].as_array().unwrap().len() == number).then_some(timeline)
        })
        .await
    };
    let timeline = whole(11).await;
    let expected = [
        "orders placed",
        "orders enqueued",
        "orders published",
        "payments taken",
        "payments decided",
        "payments enqueued",
        "payments published",
        "orders taken",
        "orders ended",
        "orders enqueued",
        "orders published",
    ];
    let mut steps_in_order = steps(&timeline);
    // A message may arrive before its publisher has marked it, so these two steps may be swapped.
    let sorted = |mut steps: Vec<String>| {
        steps.sort();
        steps
    };
    assert_eq!(
        sorted(steps_in_order.clone()),
        sorted(expected.map(str::to_owned).to_vec())
    );
    steps_in_order.retain(|step| !step.ends_with("published"));
    assert_eq!(
        steps_in_order,
        expected
            .into_iter()
            .filter(|step| !step.ends_with("published"))
            .collect::<Vec<_>>()
    );
    assert_eq!(
        (&timeline["missing"], &timeline["pruned"]),
        (&json!([]), &json!(false))
    );
    let step = |name: &str, service: &str| {
        let mut steps = timeline["steps"].as_array().unwrap().iter();
        steps
            .find(|step| step["step"] == name && step["service"] == service)
            .unwrap()
            .clone()
    };
    let decided = step("decided", "payments");
    assert_eq!(
        (&decided["outcome"], &decided["balance_after"]),
        (&json!("paid"), &json!(70))
    );
    let request = step("enqueued", "orders");
    assert_eq!(
        request["message"]["payload"],
        json!({ "order_id": placed["id"], "user_id": "alice", "amount": 30 })
    );
    assert_eq!(request["message"]["headers"]["ce-subject"], placed["id"]);
    assert_eq!(
        step("published", "orders")["stream_sequence"],
        step("taken", "payments")["stream_sequence"]
    );

    // Everything is replayed.
    let ops = shop.operator().await;
    shop.replay_stream(&ops, "ORDERS", 2).await;
    shop.replay_stream(&ops, "PAYMENTS", 1).await;
    let timeline = whole(13).await;
    let mut repeated: Vec<_> = timeline["steps"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|step| step["step"] == "repeated")
        .map(|step| (step["service"].as_str().unwrap(), step["times"].clone()))
        .collect();
    // Which of the two streams is read first is not determined.
    repeated.sort_by_key(|(service, _)| *service);
    assert_eq!(repeated, [("orders", json!(1)), ("payments", json!(1))]);

    shop.stack.system.stop("payments").await.unwrap();
    let partial = shop.http.get(&path).await.unwrap();
    assert_eq!(
        (partial.status, &partial.json()["missing"]),
        (200, &json!(["payments"]))
    );
    shop.stack.system.start("payments").await.unwrap();

    for name in ["orders", "payments"] {
        shop.database(name)
            .await
            .execute_unprepared("DELETE FROM outbox; DELETE FROM inbox")
            .await
            .unwrap();
    }
    let timeline = shop.http.get(&path).await.unwrap().json();
    assert_eq!(
        steps(&timeline),
        ["orders placed", "payments decided", "orders ended"]
    );
    assert_eq!(timeline["pruned"], json!(true));

    for id in [
        "01933f3c-7d5a-7b60-9d6f-000000000000",
        "nonsense",
        "..%2f..%2flivez",
    ] {
        let unknown = shop
            .http
            .get(&format!("/v1/orders/{id}/timeline"))
            .await
            .unwrap();
        assert_eq!(
            (unknown.status, &unknown.json()["code"]),
            (404, &json!("order_not_found")),
            "{id}"
        );
    }
}
