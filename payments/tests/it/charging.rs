//! An order is debited once, whatever the broker delivers.

use futures_util::future::join_all;
use sea_orm::{ConnectionTrait as _, TransactionTrait as _};

use crate::harness::{Payments, Request, SOON, request};
use stack::testing::{HeldInserts, eventually};

#[tokio::test]
async fn an_order_is_debited_and_answered() {
    let payments = Payments::start().await;
    payments.open_account("alice", 1000).await;
    let order = request("alice", 700);
    payments.publish(&order).await;

    let decision = payments.decision(&order).await;
    assert_eq!(
        (decision.outcome.as_str(), decision.reason.as_deref()),
        ("paid", None)
    );
    assert_eq!(payments.balance("alice").await, 300);
    payments.until_quiet().await;
    assert_eq!(payments.answers(&order).await, 1);
    assert_eq!(
        payments
            .count("SELECT count(*) FROM inbox WHERE consumer = 'payments-order-placed'")
            .await,
        1
    );
    payments.assert_books_balance().await;
}

#[tokio::test]
async fn f41_a_refusal_stands_even_after_a_top_up() {
    // Otherwise a late redelivery would debit an order that is already CANCELLED (I2).
    let payments = Payments::start().await;
    payments.open_account("alice", 10).await;
    let (dear, unknown) = (request("alice", 11), request("bob", 1));
    payments.publish(&dear).await;
    payments.publish(&unknown).await;
    assert_eq!(
        payments.decision(&dear).await.reason.as_deref(),
        Some("insufficient_funds")
    );
    assert_eq!(
        payments.decision(&unknown).await.reason.as_deref(),
        Some("no_account")
    );

    payments.deposit("alice", 1000).await;
    payments.open_account("bob", 1000).await;
    payments.publish(&dear).await;
    payments.publish(&unknown).await;
    payments.until_repeats(2).await;

    assert_eq!(payments.decision(&dear).await.outcome, "declined");
    assert_eq!(
        (
            payments.balance("alice").await,
            payments.balance("bob").await
        ),
        (1010, 1000)
    );
    payments.assert_books_balance().await;
}

#[tokio::test]
async fn a_redelivered_order_writes_nothing_but_its_counter() {
    let payments = Payments::start().await;
    payments.open_account("alice", 1000).await;
    let order = request("alice", 700);
    payments.publish(&order).await;
    payments.decision(&order).await;
    payments.publish(&order).await;
    payments.publish(&order).await;
    payments.until_repeats(2).await;

    assert_eq!(payments.balance("alice").await, 300);
    assert_eq!(payments.answers(&order).await, 1);
    payments.assert_books_balance().await;
}

#[tokio::test]
async fn the_same_event_twice_and_two_asks_of_one_order_in_one_batch_are_one_debit() {
    let payments = Payments::start().await;
    payments.open_account("alice", 500).await;
    let order = request("alice", 100);
    let other_event = Request {
        event_id: shared_contracts::EventId::mint(),
        ..order.clone()
    };
    let messages = [
        order.clone(),
        order.clone(),
        order.asked(1),
        order.asked(2),
        other_event,
        request("alice", 1),
    ];
    payments
        .as_one_batch(6, async || {
            for message in &messages {
                payments.publish(message).await;
            }
        })
        .await;

    payments.until_repeats(3).await;
    let batches = "SELECT count(DISTINCT received_at) FROM inbox";
    assert_eq!(
        payments.count(batches).await,
        2,
        "one batch with the plug, and one with all messages"
    );
    assert_eq!(payments.decisions().await, 3);
    assert_eq!(payments.balance("alice").await, 399);
    assert_eq!(
        payments.answers(&order).await,
        1,
        "one answer for both re-asks"
    );
    assert_eq!(payments.decision(&order).await.last_ask, 2);
    payments.assert_books_balance().await;
}

#[tokio::test]
async fn a_re_ask_is_answered_again_once() {
    let payments = Payments::start().await;
    payments.open_account("alice", 1000).await;
    let order = request("alice", 700);
    payments.publish(&order).await;
    payments.decision(&order).await;

    payments.publish(&order.asked(1)).await;
    payments.until_repeats(1).await;
    assert_eq!(
        payments.answers(&order).await,
        2,
        "a re-ask publishes the answer again"
    );
    payments.publish(&order.asked(1)).await;
    payments.publish(&order.asked(0)).await;
    payments.until_repeats(3).await;
    assert_eq!(
        payments.answers(&order).await,
        2,
        "an answered number is not answered again"
    );
    payments.publish(&order.asked(3)).await;
    payments.until_repeats(4).await;
    assert_eq!(payments.answers(&order).await, 3);

    let same_event = format!(
        "SELECT count(DISTINCT event_id) FROM outbox WHERE payload LIKE '%{}%'",
        order.order_id()
    );
    assert_eq!(
        payments.count(&same_event).await,
        1,
        "the answer is one event, however often it is published"
    );
    payments.until_quiet().await;
    assert_eq!(payments.balance("alice").await, 300);
    payments.assert_books_balance().await;
}

#[tokio::test]
async fn the_decision_guards_even_without_an_inbox_row() {
    let payments = Payments::start().await;
    payments.open_account("alice", 1000).await;
    let order = request("alice", 700);
    payments.publish(&order).await;
    payments.decision(&order).await;
    payments.execute("DELETE FROM inbox").await;

    payments.publish(&order).await;
    eventually("the message is received again", SOON, async || {
        (payments.count("SELECT count(*) FROM inbox").await == 1).then_some(())
    })
    .await;
    assert_eq!(payments.balance("alice").await, 300);
    assert_eq!(payments.answers(&order).await, 1);
    payments.assert_books_balance().await;
}

#[tokio::test]
async fn f40_two_replicas_on_one_account_with_money_for_37_of_100_orders_pay_exactly_37() {
    let payments = Payments::start().await;
    payments.open_account("alice", 370).await;
    let second = payments.replica().await;
    let orders: Vec<Request> = (0..100).map(|_| request("alice", 10)).collect();
    // Each order is published twice, so that both replicas often hold the same one.
    join_all(
        orders
            .iter()
            .chain(&orders)
            .map(|order| payments.publish(order)),
    )
    .await;
    payments.until_repeats(100).await;

    assert_eq!(payments.decisions().await, 100);
    assert_eq!(
        payments
            .count("SELECT count(*) FROM payments WHERE outcome = 'paid'")
            .await,
        37
    );
    assert_eq!(payments.balance("alice").await, 0);
    assert_eq!(payments.count("SELECT count(*) FROM outbox").await, 100);
    payments.until_quiet().await;
    payments.assert_books_balance().await;
    second.stop().await.unwrap();
}

#[tokio::test]
async fn two_replicas_that_decline_the_same_order_without_an_account_decide_it_once() {
    // Without an account there is no row to lock: the only guard is the decision's primary key.
    let payments = Payments::start().await;
    let second = payments.replica().await;
    let orders: Vec<Request> = (0..50).map(|_| request("nobody", 10)).collect();
    join_all(
        orders
            .iter()
            .chain(&orders)
            .chain(&orders)
            .map(|order| payments.publish(order)),
    )
    .await;
    payments.until_repeats(100).await;
    assert_eq!(
        payments
            .count("SELECT count(*) FROM payments WHERE reason = 'no_account'")
            .await,
        50
    );
    assert_eq!(payments.count("SELECT count(*) FROM outbox").await, 50);
    second.stop().await.unwrap();
}

#[tokio::test]
async fn a_decision_that_another_worker_commits_first_is_not_answered_a_second_time() {
    // Another worker has decided the order but not committed. So this worker reads no decision and
    // decides too; only the primary key of the decision shows the conflict.
    let payments = Payments::start().await;
    let order = request("nobody", 1);
    let other = payments.another_connection().await.begin().await.unwrap();
    let decide = format!(
        "INSERT INTO payments (order_id, user_id, amount, request_hash, outcome, reason, request_event_id, event_id)
         VALUES ('{0}', 'nobody', 1, sha256(uuid_send('{0}') || int8send(1) || 'nobody'::bytea), 'declined', 'no_account', '{1}',
                 gen_random_uuid())",
        order.order_id(),
        order.event_id
    );
    other.execute_unprepared(&decide).await.unwrap();
    payments.publish(&order).await;
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()";
    eventually(
        "the service waits for the other transaction",
        SOON,
        async || (payments.count(waiting).await == 1).then_some(()),
    )
    .await;
    other.commit().await.unwrap();

    eventually("the message is received", SOON, async || {
        (payments.count("SELECT count(*) FROM inbox").await == 1).then_some(())
    })
    .await;
    assert_eq!(
        payments.answers(&order).await,
        0,
        "only the worker that decided publishes the answer"
    );
    assert_eq!(payments.count("SELECT count(*) FROM dead_letters").await, 0);
}

#[tokio::test]
async fn a_crash_before_the_commit_leaves_nothing_and_the_order_is_debited_after() {
    let mut payments = Payments::start().await;
    payments.open_account("alice", 1000).await;
    let held = HeldInserts::blocked(payments.another_connection().await, "payments");
    let held = held.await.unwrap();
    let order = request("alice", 700);
    payments.publish(&order).await;
    payments.until_blocked().await;
    payments.crash().await;
    held.release().await.unwrap();
    assert_eq!(payments.decisions().await, 0);

    payments.run().await;
    assert_eq!(payments.decision(&order).await.outcome, "paid");
    assert_eq!(payments.balance("alice").await, 300);
    payments.until_quiet().await;
    assert_eq!(payments.answers(&order).await, 1);
    payments.assert_books_balance().await;
}

#[tokio::test]
async fn f32_ten_copies_of_every_order_in_any_order_are_one_debit_each() {
    let payments = Payments::start().await;
    payments.open_account("alice", 1000).await;
    let orders: Vec<_> = (0..20).map(|_| request("alice", 10)).collect();
    // 7 and 200 have no common divisor: every copy is published once, far from the others.
    for step in 0..200 {
        payments.publish(&orders[step * 7 % 200 % 20]).await;
    }
    for order in &orders {
        assert_eq!(payments.decision(order).await.outcome, "paid");
    }
    payments.until_repeats(180).await;
    for order in &orders {
        assert_eq!(payments.answers(order).await, 1);
    }
    assert_eq!(payments.balance("alice").await, 800);
    payments.assert_books_balance().await;
}

#[tokio::test]
async fn a_stopping_service_gives_its_messages_back_at_once() {
    let mut payments = Payments::start_with_ack_wait(10 * 60 * 1000).await;
    let orders: Vec<_> = (0..5).map(|_| request("nobody", 1)).collect();
    let holder = payments
        .while_blocked(5, async || {
            for order in &orders {
                payments.publish(order).await;
            }
        })
        .await;
    payments.stop().await;
    holder.release().await.unwrap();
    payments.run().await;
    for order in &orders {
        payments.decision(order).await;
    }
}

#[tokio::test]
async fn a_durable_that_is_created_anew_begins_near_the_end_of_a_long_stream() {
    let mut payments = Payments::start().await;
    payments.stop().await;
    payments.delete_durable().await;
    let old = request("nobody", 1);
    payments.publish(&old).await;
    payments.publish_many("nobody", 10_100).await;
    let young = request("nobody", 1);
    payments.publish(&young).await;

    payments.run().await;
    payments.decision(&young).await;
    assert_eq!(payments.decisions().await, 10_000);
    let decided = format!(
        "SELECT count(*) FROM payments WHERE order_id = '{}'",
        old.order_id()
    );
    assert_eq!(payments.count(&decided).await, 0, "it will be asked again");
}

#[tokio::test]
async fn money_rows_cannot_be_changed_or_deleted() {
    let payments = Payments::start().await;
    payments.open_account("alice", 1000).await;
    let order = request("alice", 700);
    payments.publish(&order).await;
    payments.decision(&order).await;
    for statement in [
        "UPDATE transfers SET amount = 1",
        "DELETE FROM transfers",
        "TRUNCATE transfers",
        "UPDATE payments SET outcome = 'declined', reason = 'no_account', transfer_id = NULL",
        "UPDATE payments SET amount = 1",
        "UPDATE payments SET last_ask = -1",
        "DELETE FROM payments",
        "TRUNCATE payments",
        "UPDATE accounts SET balance = -1",
        "UPDATE accounts SET balance = 9000000000000001",
    ] {
        let refused = payments.db.execute_unprepared(statement).await;
        assert!(refused.is_err(), "{statement}");
    }
    payments.assert_books_balance().await;
}
