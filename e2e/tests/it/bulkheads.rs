//! A service whose database hangs delays only requests to that service.
//!
//! The short form runs with a small limit. `GOZON_LONG=1` runs the full form with the default
//! limits.

use std::time::Duration;

use futures_util::future::join_all;
use sea_orm::{ConnectionTrait as _, TransactionTrait as _};
use serde_json::json;
use stack::http::Http;
use stack::testing::eventually;

use crate::shop::{SOON, Shop};

/// Repeats a hanging request without end, as impatient clients do.
async fn insist(http: &Http, path: &str) {
    loop {
        let _ = http.get(path).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test]
async fn f61_clients_of_a_service_with_locked_tables_keep_no_request_from_the_other() {
    let long = std::env::var_os("GOZON_LONG").is_some();
    let (clients, requests) = if long { (700, 200) } else { (60, 20) };
    let environment: &[(&str, &str)] = if long {
        &[]
    } else {
        &[("GOZON_REQUESTS_MAX", "16")]
    };
    let shop = Shop::start_with(environment).await;
    shop.customer("alice", 1000).await;
    let order = json!({ "user_id": "alice", "amount": 1 });
    let deposit = json!({ "amount": 1 });
    for (database, table, hangs, works, body) in [
        (
            "payments",
            "accounts",
            "/v1/accounts/alice",
            "/v1/orders",
            &order,
        ),
        (
            "orders",
            "orders",
            "/v1/orders",
            "/v1/accounts/alice/deposits",
            &deposit,
        ),
    ] {
        let lock = shop.database(database).await.begin().await.unwrap();
        lock.execute_unprepared(&format!("LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE"))
            .await
            .unwrap();
        let working = async {
            eventually("all slots are taken", SOON, async || {
                let answer = shop.http.get(hangs).await.unwrap();
                (answer.status == 503 && answer.text().contains("overloaded")).then_some(())
            })
            .await;
            let mut accepted = 0;
            for _ in 0..requests {
                let answer = shop.http.post(works, None, body).await.unwrap();
                accepted += usize::from(answer.status == 201);
            }
            accepted
        };
        let accepted = tokio::select! {
            accepted = working => accepted,
            _ = join_all((0..clients).map(|_| insist(&shop.http, hangs))) => unreachable!("they never end"),
        };
        assert_eq!(accepted, requests, "POST {works} while {table} is locked");
        lock.rollback().await.unwrap();
    }
    assert_eq!(shop.assert_settled(requests).await, requests);
}
