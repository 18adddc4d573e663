//! Accounts and deposits over HTTP.

use futures_util::future::join_all;
use serde_json::{Value, json};
use stack::http::Answer;

use crate::harness::{Payments, request};

async fn deposit(payments: &Payments, key: &str, amount: i64) -> Answer {
    payments
        .http
        .post(
            "/v1/accounts/alice/deposits",
            Some(key),
            &json!({ "amount": amount }),
        )
        .await
        .unwrap()
}

#[tokio::test]
async fn an_account_is_opened_once_and_the_same_key_gets_the_same_answer() {
    let payments = Payments::start().await;
    let open = async |key| {
        payments
            .http
            .post("/v1/accounts", Some(key), &json!({ "user_id": "alice" }))
            .await
            .unwrap()
    };
    let first = open("a").await;
    assert_eq!(
        (first.status, first.header("idempotency-replayed")),
        (201, None)
    );
    assert_eq!(
        (&first.json()["user_id"], &first.json()["balance"]),
        (&json!("alice"), &json!(0))
    );
    payments.deposit("alice", 5).await;

    let again = open("a").await;
    assert_eq!(
        (again.status, again.header("idempotency-replayed")),
        (201, Some("true"))
    );
    assert_eq!(
        again.body, first.body,
        "the same bytes, although the balance is higher now"
    );
    let other = open("b").await;
    assert_eq!(
        (other.status, &other.json()["code"]),
        (409, &json!("account_already_exists"))
    );
    assert_eq!(
        payments
            .http
            .get("/v1/accounts/alice")
            .await
            .unwrap()
            .json()["balance"],
        5
    );
}

#[tokio::test]
async fn f41_a_retried_deposit_adds_once() {
    let payments = Payments::start().await;
    payments.open_account("alice", 0).await;
    let first = deposit(&payments, "d", 100).await;
    assert_eq!((first.status, &first.json()["balance"]), (201, &json!(100)));
    deposit(&payments, "e", 50).await;

    let again = deposit(&payments, "\"d\"", 100).await;
    assert_eq!(
        (again.status, again.header("idempotency-replayed")),
        (201, Some("true"))
    );
    assert_eq!(
        again.body, first.body,
        "the same bytes, although the balance is higher now"
    );
    let other = deposit(&payments, "d", 101).await;
    assert_eq!(
        (other.status, &other.json()["code"]),
        (422, &json!("idempotency_key_reused"))
    );
    assert_eq!(payments.balance("alice").await, 150);
    payments.assert_books_balance().await;
}

#[tokio::test]
async fn f41_fifty_parallel_deposits_with_one_key_add_once() {
    let payments = Payments::start().await;
    payments.open_account("alice", 0).await;
    let answers = join_all((0..50).map(|_| deposit(&payments, "one", 100))).await;
    assert!(
        answers
            .iter()
            .all(|answer| answer.status == 201 && answer.body == answers[0].body)
    );
    assert_eq!(
        answers
            .iter()
            .filter(|answer| answer.header("idempotency-replayed").is_none())
            .count(),
        1
    );
    assert_eq!(payments.balance("alice").await, 100);
    payments.assert_books_balance().await;
}

#[tokio::test]
async fn fifty_parallel_deposits_with_fifty_keys_all_count() {
    let payments = Payments::start().await;
    payments.open_account("alice", 0).await;
    let keys: Vec<String> = (0..50).map(|number| format!("deposit {number}")).collect();
    let answers = join_all(keys.iter().map(|key| deposit(&payments, key, 100))).await;
    assert!(answers.iter().all(|answer| answer.status == 201));
    assert_eq!(payments.balance("alice").await, 5000);
    payments.assert_books_balance().await;
}

#[tokio::test]
async fn a_statement_is_read_page_by_page_and_its_sums_match() {
    let payments = Payments::start().await;
    payments.open_account("alice", 0).await;
    for number in 1..=5 {
        payments.deposit("alice", number * 100).await;
    }
    let order = request("alice", 50);
    payments.publish(&order).await;
    payments.decision(&order).await;

    let path = "/v1/accounts/alice/entries?limit=2";
    let mut page = payments.http.get(path).await.unwrap().json();
    // A deposit between two pages does not shift them.
    payments.deposit("alice", 7).await;
    let mut entries = page["items"].as_array().unwrap().clone();
    while let Some(cursor) = page["next_cursor"].as_str() {
        page = payments
            .http
            .get(&format!("{path}&cursor={cursor}"))
            .await
            .unwrap()
            .json();
        entries.extend(page["items"].as_array().unwrap().clone());
    }
    let number = |entry: &Value, name: &str| entry[name].as_i64().unwrap();
    assert_eq!(
        entries
            .iter()
            .map(|entry| number(entry, "entry_no"))
            .collect::<Vec<_>>(),
        [6, 5, 4, 3, 2, 1]
    );
    assert_eq!(entries[0]["order_id"], json!(order.order_id()));
    assert_eq!(
        (entries[0]["kind"].as_str(), number(&entries[0], "amount")),
        (Some("payment"), -50)
    );
    for (entry, earlier) in entries.iter().zip(&entries[1..]) {
        assert_eq!(
            number(entry, "balance_after"),
            number(earlier, "balance_after") + number(entry, "amount")
        );
    }

    assert_eq!(
        payments
            .http
            .get("/v1/accounts/nobody/entries")
            .await
            .unwrap()
            .status,
        404
    );
    for bad in [
        "limit=0",
        "limit=101",
        "limit=x",
        "cursor=0",
        "cursor=x",
        "page=2",
    ] {
        let answer = payments
            .http
            .get(&format!("/v1/accounts/alice/entries?{bad}"))
            .await
            .unwrap();
        assert_eq!(
            (answer.status, &answer.json()["code"]),
            (422, &json!("validation_failed")),
            "{bad}"
        );
    }
}

#[tokio::test]
async fn bad_input_is_refused_with_advice_and_nothing_is_stored() {
    let payments = Payments::start().await;
    payments.open_account("alice", 0).await;
    let mut cases: Vec<(&str, Value, u16, &str)> = vec![
        ("/v1/accounts", json!({}), 422, "/user_id"),
        ("/v1/accounts", json!({ "user_id": 7 }), 422, "/user_id"),
        ("/v1/accounts", json!({ "user_id": "a b" }), 422, "/user_id"),
        (
            "/v1/accounts",
            json!({ "user_id": "x".repeat(65) }),
            422,
            "/user_id",
        ),
        ("/v1/accounts", json!({ "user_id": ".." }), 422, "/user_id"),
        (
            "/v1/accounts?surprise=1",
            json!({ "user_id": "bob" }),
            422,
            "surprise",
        ),
        (
            "/v1/accounts/alice/deposits?surprise=1",
            json!({ "amount": 1 }),
            422,
            "surprise",
        ),
        (
            "/v1/accounts",
            json!({ "user_id": "bob", "balance": 1000 }),
            422,
            "/balance",
        ),
        (
            "/v1/accounts/nobody/deposits",
            json!({ "amount": 1 }),
            404,
            "",
        ),
        (
            "/v1/accounts/a%20b/deposits",
            json!({ "amount": 1 }),
            404,
            "",
        ),
        ("/v1/accounts/alice/deposits", json!([1]), 422, ""),
    ];
    for amount in [
        json!(0),
        json!(-1),
        json!(1.5),
        json!("1"),
        json!(1_000_000_000_001_i64),
        json!(null),
        json!(true),
    ] {
        cases.push((
            "/v1/accounts/alice/deposits",
            json!({ "amount": amount }),
            422,
            "/amount",
        ));
    }
    for (path, body, status, pointer) in cases {
        let answer = payments.http.post(path, None, &body).await.unwrap();
        assert_eq!(answer.status, status, "{path} {body}: {}", answer.text());
        assert_eq!(
            answer.header("content-type"),
            Some("application/problem+json")
        );
        if !pointer.is_empty() {
            assert_eq!(
                answer.json()["errors"][0]["pointer"],
                pointer,
                "{path} {body}"
            );
        }
    }
    let raw = [("content-type", "application/json")];
    for (body, status) in [
        (r#"{"amount": 1e3}"#, 422),
        (r#"{"amount": 1, "amount": 2}"#, 422),
        ("{", 400),
        ("", 400),
    ] {
        let answer = payments
            .http
            .request("POST", "/v1/accounts/alice/deposits", &raw, body.into())
            .await
            .unwrap();
        assert_eq!(answer.status, status, "{body}");
    }
    let timeline = "/v1/payments/01933f3c-7d5a-7b60-9d6f-3f0b4b1f2a11/timeline";
    for path in [
        "/v1/accounts/alice",
        "/v1/accounts/alice/entries",
        "/v1/ops/flow",
        timeline,
    ] {
        let answer = payments
            .http
            .get(&format!("{path}?surprise=1"))
            .await
            .unwrap();
        assert_eq!(
            (answer.status, &answer.json()["errors"][0]["pointer"]),
            (422, &json!("surprise")),
            "{path}"
        );
    }
    assert_eq!(
        payments
            .http
            .get("/v1/accounts/nobody")
            .await
            .unwrap()
            .status,
        404
    );
    assert_eq!(payments.count("SELECT count(*) FROM transfers").await, 0);
    assert_eq!(payments.count("SELECT count(*) FROM accounts").await, 1);
}

#[tokio::test]
async fn a_balance_has_a_limit_that_a_deposit_cannot_pass() {
    let payments = Payments::start().await;
    payments.open_account("alice", 0).await;
    payments
        .execute("UPDATE accounts SET balance = 9000000000000000 - 10")
        .await;
    let refused = deposit(&payments, "d", 11).await;
    assert_eq!(
        (refused.status, &refused.json()["code"]),
        (422, &json!("balance_limit_exceeded"))
    );
    assert_eq!(
        deposit(&payments, "d", 10).await.status,
        201,
        "a refused request does not use its key"
    );
}
