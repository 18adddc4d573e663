//! Restored backups, and overload.

use std::time::Duration;

use e2e::broker::replay_stream;
use futures_util::future::join_all;
use ops::audit::{self, Databases, FindingKind};
use sea_orm::ConnectionTrait as _;
use serde_json::json;
use stack::testing::eventually;

use crate::shop::{SOON, Shop};

const AT_ONCE: audit::Options = audit::Options {
    grace: Duration::ZERO,
    stuck_after: Duration::from_secs(3600),
    late_after: Duration::from_secs(3600),
};

/// Places three orders, copies one database, places four more orders, and restores the copy.
async fn shop_with_a_restored_database(name: &'static str) -> Shop {
    let mut shop = Shop::start().await;
    shop.customer("alice", 100).await;
    for _ in 0..3 {
        assert_eq!(shop.order("alice", 10).await.0, "FINISHED");
    }
    let server = shop.database("postgres").await;
    shop.stack.system.stop(name).await.unwrap();
    server
        .execute_unprepared(&format!(
            "CREATE DATABASE kept TEMPLATE {name} OWNER {name}"
        ))
        .await
        .unwrap();
    shop.stack.system.start(name).await.unwrap();
    for _ in 0..4 {
        assert_eq!(shop.order("alice", 10).await.0, "FINISHED");
    }
    assert_eq!(findings(&shop).await, []);
    shop.stack.system.stop(name).await.unwrap();
    server
        .execute_unprepared(&format!("DROP DATABASE {name} WITH (FORCE)"))
        .await
        .unwrap();
    server
        .execute_unprepared(&format!("ALTER DATABASE kept RENAME TO {name}"))
        .await
        .unwrap();
    shop.stack.system.start(name).await.unwrap();
    shop
}

async fn findings(shop: &Shop) -> Vec<FindingKind> {
    let databases = Databases {
        orders: shop.database("orders").await,
        payments: shop.database("payments").await,
    };
    let report = audit::audit(&databases, AT_ONCE).await.unwrap();
    databases.orders.close().await.unwrap();
    databases.payments.close().await.unwrap();
    report.findings.iter().map(|finding| finding.kind).collect()
}

/// The database of payments is restored from a backup (F14): the audit names what is missing, and
/// replaying the orders debits exactly that.
#[tokio::test]
async fn f14_payments_restored_from_a_backup_is_reported_and_healed_by_replaying_the_orders() {
    let shop = shop_with_a_restored_database("payments").await;
    assert_eq!(
        findings(&shop).await,
        [FindingKind::FinishedWithoutDebit; 4]
    );
    assert_eq!(
        shop.balance("alice").await,
        70,
        "the balance is that of the backup"
    );
    let ops = shop.operator().await;
    replay_stream(&ops, "ORDERS", u64::MAX).await.unwrap();
    eventually("the four orders are debited again", SOON, async || {
        (shop.balance("alice").await == 30).then_some(())
    })
    .await;
    assert_eq!(shop.assert_settled(7).await, 7);
    assert_eq!(findings(&shop).await, []);
}

/// The database of orders is restored from a backup (F14): the audit names debits for unknown
/// orders, and their answers become dead letters.
#[tokio::test]
async fn f14_orders_restored_from_a_backup_is_reported_and_nothing_is_debited_twice() {
    let shop = shop_with_a_restored_database("orders").await;
    assert_eq!(findings(&shop).await, [FindingKind::Unexpected; 4]);
    let ops = shop.operator().await;
    replay_stream(&ops, "PAYMENTS", u64::MAX).await.unwrap();
    replay_stream(&ops, "ORDERS", u64::MAX).await.unwrap();
    eventually("all messages are acknowledged", SOON, async || {
        shop.all_acknowledged(&ops).await.then_some(())
    })
    .await;
    assert_eq!(shop.balance("alice").await, 30);
    let named = findings(&shop).await;
    let number = |kind: FindingKind| named.iter().filter(|found| **found == kind).count();
    assert_eq!(
        (
            number(FindingKind::Unexpected),
            number(FindingKind::DeadLetter),
            named.len()
        ),
        (4, 4, 8),
        "{named:?}"
    );
}

/// Far more concurrent requests than the limit (F50): each is answered, a rejection contains
/// Retry-After, and all of them are done once when retried.
#[tokio::test]
async fn f50_too_many_orders_at_once_are_rejected_with_retry_after_and_done_once() {
    const MANY: usize = 1500;
    let shop = Shop::start().await;
    shop.customer("alice", 1000).await;
    let body = json!({ "user_id": "alice", "amount": 1 });
    let answers = join_all((0..MANY).map(|number| {
        let (shop, body) = (&shop, &body);
        async move {
            (
                number,
                shop.http
                    .post("/v1/orders", Some(&format!("order-{number}")), body)
                    .await
                    .unwrap(),
            )
        }
    }))
    .await;
    let mut again = Vec::new();
    for (number, answer) in &answers {
        match answer.status {
            201 => {}
            429 | 503 => {
                assert!(answer.header("retry-after").is_some(), "{}", answer.text());
                again.push(*number);
            }
            other => panic!("{other}: {}", answer.text()),
        }
    }
    assert_eq!(shop.http.get("/readyz").await.unwrap().status, 200);
    for number in again {
        eventually("the request is done", SOON, async || {
            let answer = shop
                .http
                .post("/v1/orders", Some(&format!("order-{number}")), &body)
                .await
                .unwrap();
            (answer.status == 201).then_some(())
        })
        .await;
    }
    assert_eq!(
        shop.assert_settled(MANY).await,
        1000,
        "the money pays for this number of orders"
    );
}
