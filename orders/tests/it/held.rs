//! An order whose row is locked delays no other.

use std::time::Duration;

use sea_orm::{ConnectionTrait as _, TransactionTrait as _};
use shared_contracts::PaymentOutcome::Paid;
use stack::testing::eventually;

use crate::harness::{Orders, settlement};

#[tokio::test]
async fn f65_a_locked_order_delays_no_other_and_ends_after_the_release() {
    let mut orders = Orders::start().await;
    let payments = orders.payments().await;
    let locked = orders.placed().await;
    let mut others = Vec::new();
    for _ in 0..20 {
        others.push(orders.placed().await);
    }
    let lock = orders
        .database
        .connect()
        .await
        .unwrap()
        .begin()
        .await
        .unwrap();
    let select = format!("SELECT 1 FROM orders WHERE id = '{locked}' FOR UPDATE");
    lock.execute_unprepared(&select).await.unwrap();

    payments.publish(&settlement(locked, Paid)).await;
    for id in &others {
        payments.publish(&settlement(*id, Paid)).await;
    }
    for id in others {
        orders.until_status(id, "FINISHED").await;
    }
    orders.until_status(locked, "NEW").await;
    let deferred = "SELECT count(*) FROM deferred";
    orders.until("its answer is deferred", deferred, 1).await;

    lock.rollback().await.unwrap();
    eventually("it ends", Duration::from_secs(2), async || {
        let row = orders.row(locked).await;
        (row.final_event_id.is_some()).then_some(())
    })
    .await;
    orders.until("nothing is deferred", deferred, 0).await;
    orders.stop().await;
}
