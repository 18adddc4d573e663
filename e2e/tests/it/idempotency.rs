//! Edge cases of idempotency keys, through the gateway.

use bytes::Bytes;
use serde_json::{Value, json};
use stack::http::Answer;

use crate::shop::Shop;

async fn post(shop: &Shop, path: &str, key: &str, body: &Value) -> Answer {
    shop.http.post(path, Some(key), body).await.unwrap()
}

fn replayed(answer: &Answer) -> bool {
    answer.header("idempotency-replayed") == Some("true")
}

#[tokio::test]
async fn an_idempotency_key_is_per_user_and_bound_only_by_success() {
    let shop = Shop::start().await;
    let order = json!({ "user_id": "alice", "amount": 10 });

    // A rejected request binds nothing: corrected, it is accepted under the same key.
    let refused = post(
        &shop,
        "/v1/accounts/alice/deposits",
        "salary",
        &json!({ "amount": 100 }),
    )
    .await;
    assert_eq!(
        (refused.status, &refused.json()["code"]),
        (404, &json!("account_not_found"))
    );
    let refused = post(&shop, "/v1/accounts", "open", &json!({ "user_id": "a b" })).await;
    assert_eq!(refused.status, 422);
    let opened = post(
        &shop,
        "/v1/accounts",
        "open",
        &json!({ "user_id": "alice" }),
    )
    .await;
    assert_eq!((opened.status, replayed(&opened)), (201, false));
    let refused = post(
        &shop,
        "/v1/accounts/alice/deposits",
        "salary",
        &json!({ "amount": 0 }),
    )
    .await;
    assert_eq!(refused.status, 422);
    let paid_in = post(
        &shop,
        "/v1/accounts/alice/deposits",
        "salary",
        &json!({ "amount": 100 }),
    )
    .await;
    assert_eq!((paid_in.status, replayed(&paid_in)), (201, false));
    let refused = post(
        &shop,
        "/v1/orders",
        "lamp",
        &json!({ "user_id": "alice", "amount": 10, "colour": "red" }),
    )
    .await;
    assert_eq!(refused.status, 422);
    let placed = post(&shop, "/v1/orders", "lamp", &order).await;
    assert_eq!((placed.status, replayed(&placed)), (201, false));

    // Bare or quoted, it is the same key. White space and field order of the JSON body do not
    // matter.
    let headers = [
        ("content-type", "application/json"),
        ("idempotency-key", r#""lamp""#),
    ];
    let rewritten =
        Bytes::from_static(br#" { "amount" : 10 , "description":"", "user_id":"\u0061lice" } "#);
    let again = shop
        .http
        .request("POST", "/v1/orders", &headers, rewritten)
        .await
        .unwrap();
    assert_eq!(
        (again.status, replayed(&again), &again.body),
        (201, true, &placed.body)
    );
    assert_eq!(again.header("location"), placed.header("location"));

    // The same key for another kind of request, or from another user, is another request.
    let other_kind = post(
        &shop,
        "/v1/accounts/alice/deposits",
        "lamp",
        &json!({ "amount": 5 }),
    )
    .await;
    assert_eq!((other_kind.status, replayed(&other_kind)), (201, false));
    let other_user = post(
        &shop,
        "/v1/orders",
        "lamp",
        &json!({ "user_id": "bob", "amount": 10 }),
    )
    .await;
    assert_eq!((other_user.status, replayed(&other_user)), (201, false));
    assert_ne!(other_user.json()["id"], placed.json()["id"]);

    // Other content is rejected, and the first answer is kept.
    for (path, key, body) in [
        (
            "/v1/orders",
            "lamp",
            json!({ "user_id": "alice", "amount": 11 }),
        ),
        (
            "/v1/orders",
            "lamp",
            json!({ "user_id": "alice", "amount": 10, "description": "x" }),
        ),
        (
            "/v1/accounts/alice/deposits",
            "salary",
            json!({ "amount": 101 }),
        ),
    ] {
        let refused = post(&shop, path, key, &body).await;
        assert_eq!(
            (refused.status, &refused.json()["code"]),
            (422, &json!("idempotency_key_reused")),
            "{path} {body}"
        );
    }
    let another_key = post(
        &shop,
        "/v1/accounts",
        "open again",
        &json!({ "user_id": "alice" }),
    )
    .await;
    assert_eq!(
        (another_key.status, &another_key.json()["code"]),
        (409, &json!("account_already_exists"))
    );

    // The first answers are returned byte for byte, whatever has happened since.
    let finished = shop
        .http
        .get(&format!("{}?wait=30", placed.header("location").unwrap()))
        .await
        .unwrap()
        .json();
    assert_eq!(finished["status"], "FINISHED");
    for (path, key, body, first) in [
        (
            "/v1/accounts",
            "open",
            json!({ "user_id": "alice" }),
            &opened,
        ),
        (
            "/v1/accounts/alice/deposits",
            "salary",
            json!({ "amount": 100 }),
            &paid_in,
        ),
        ("/v1/orders", "lamp", order, &placed),
    ] {
        let again = post(&shop, path, key, &body).await;
        assert_eq!(
            (again.status, replayed(&again), &again.body),
            (201, true, &first.body),
            "{path}"
        );
    }

    for malformed in ["", " ", "\"", "\"open", "a\tb", &"x".repeat(256)] {
        let answer = post(
            &shop,
            "/v1/orders",
            malformed,
            &json!({ "user_id": "alice", "amount": 10 }),
        )
        .await;
        assert_eq!(
            (answer.status, &answer.json()["code"]),
            (400, &json!("idempotency_key_malformed")),
            "{malformed:?}"
        );
    }
    let longest = post(
        &shop,
        "/v1/orders",
        &"x".repeat(255),
        &json!({ "user_id": "alice", "amount": 10 }),
    )
    .await;
    assert_eq!(longest.status, 201);
    assert_eq!(
        shop.assert_settled(3).await,
        2,
        "both orders of alice are paid, but not that of bob, who has no account"
    );
    assert_eq!(shop.balance("alice").await, 100 + 5 - 10 - 10);
}
