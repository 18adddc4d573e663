//! The main scenario: a customer deposits money and places orders.

use serde_json::json;

use crate::shop::Shop;

#[tokio::test]
async fn a_customer_orders_until_the_money_is_gone() {
    let shop = Shop::start().await;

    // Alice opens an account and deposits 1,000.
    let opened = shop
        .http
        .post(
            "/v1/accounts",
            Some("alice's account"),
            &json!({ "user_id": "alice" }),
        )
        .await
        .unwrap();
    assert_eq!((opened.status, &opened.json()["balance"]), (201, &json!(0)));
    assert_eq!(
        opened.header("cache-control"),
        Some("no-store"),
        "answers about money must not be cached"
    );
    let paid_in = shop
        .http
        .post(
            "/v1/accounts/alice/deposits",
            Some("salary"),
            &json!({ "amount": 1000 }),
        )
        .await
        .unwrap();
    assert_eq!(
        (paid_in.status, &paid_in.json()["balance"]),
        (201, &json!(1000))
    );

    // She orders a lamp. The order exists at once and is paid a moment later.
    let lamp = json!({ "user_id": "alice", "amount": 700, "description": "A lamp" });
    let placed = shop
        .http
        .post("/v1/orders", Some("lamp"), &lamp)
        .await
        .unwrap();
    assert_eq!(
        (placed.status, &placed.json()["status"]),
        (201, &json!("NEW"))
    );
    let path = placed.header("location").unwrap().to_owned();
    let finished = shop
        .http
        .get(&format!("{path}?wait=20"))
        .await
        .unwrap()
        .json();
    assert_eq!(
        (&finished["status"], &finished["reason"]),
        (&json!("FINISHED"), &json!(null))
    );
    assert_eq!(shop.balance("alice").await, 300);

    // Her phone lost the answers and repeats all requests: it gets the same answers, and nothing is
    // done twice.
    let again = shop
        .http
        .post("/v1/orders", Some("lamp"), &lamp)
        .await
        .unwrap();
    assert_eq!(
        (
            again.status,
            again.header("idempotency-replayed"),
            &again.body
        ),
        (201, Some("true"), &placed.body)
    );
    let again = shop
        .http
        .post(
            "/v1/accounts/alice/deposits",
            Some("salary"),
            &json!({ "amount": 1000 }),
        )
        .await
        .unwrap();
    assert_eq!(
        (again.header("idempotency-replayed"), &again.body),
        (Some("true"), &paid_in.body)
    );

    // She cannot afford a second lamp; another user has no account.
    assert_eq!(
        shop.order("alice", 700).await,
        (
            "CANCELLED".to_owned(),
            Some("insufficient_funds".to_owned())
        )
    );
    assert_eq!(
        shop.order("stranger", 1).await,
        ("CANCELLED".to_owned(), Some("no_account".to_owned()))
    );
    assert_eq!(
        shop.order("alice", 300).await,
        ("FINISHED".to_owned(), None)
    );
    assert_eq!(shop.balance("alice").await, 0);

    // The list of orders shows all of them, newest first.
    let list = shop
        .http
        .get("/v1/orders?user_id=alice")
        .await
        .unwrap()
        .json();
    let statuses: Vec<_> = list["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|order| order["status"].as_str().unwrap())
        .collect();
    assert_eq!(statuses, ["FINISHED", "CANCELLED", "FINISHED"]);
    assert_eq!(shop.assert_settled(4).await, 2);
}

#[tokio::test]
async fn the_gateway_shows_the_whole_api() {
    let shop = Shop::start().await;
    let document = shop.http.get("/openapi.json").await.unwrap().json();
    let paths: Vec<_> = document["paths"].as_object().unwrap().keys().collect();
    assert_eq!(
        paths,
        [
            "/problems/{code}",
            "/v1/accounts",
            "/v1/accounts/{user_id}",
            "/v1/accounts/{user_id}/deposits",
            "/v1/accounts/{user_id}/entries",
            "/v1/ops/dead-letters",
            "/v1/ops/dead-letters/{id}/replay",
            "/v1/ops/flow",
            "/v1/orders",
            "/v1/orders/events",
            "/v1/orders/{id}",
            "/v1/orders/{id}/events",
            "/v1/orders/{id}/timeline",
        ]
    );
    for door in ["gateway", "orders", "payments"] {
        let http = stack::http::Http::new(shop.stack.system.address(door));
        let page = http.get("/swagger/").await.unwrap();
        assert!(
            page.status == 200 && page.text().contains("swagger-ui"),
            "{door}"
        );
        assert_eq!(
            http.get("/openapi.json").await.unwrap().status,
            200,
            "{door}"
        );
        assert_eq!(http.get("/livez").await.unwrap().status, 200, "{door}");
        let missing = http.get("/nowhere").await.unwrap();
        assert_eq!(
            (missing.status, &missing.json()["code"]),
            (404, &json!("not_found")),
            "{door}"
        );
    }
    let unknown = shop
        .http
        .request("DELETE", "/v1/orders", &[], bytes::Bytes::new())
        .await
        .unwrap();
    assert_eq!(
        (unknown.status, &unknown.json()["code"]),
        (405, &json!("method_not_allowed"))
    );
    let traced = shop
        .http
        .request(
            "GET",
            "/v1/orders/7",
            &[("x-request-id", "find-me-1")],
            bytes::Bytes::new(),
        )
        .await
        .unwrap();
    assert_eq!(
        (traced.header("x-request-id"), &traced.json()["request_id"]),
        (Some("find-me-1"), &json!("find-me-1"))
    );
}
