//! Orders become final as payments decided, and waiting requests are answered.

use std::time::{Duration, Instant};

use messaging::DeadLetter;
use sea_orm::ConnectionTrait as _;
use serde_json::json;
use shared_contracts::{Amount, DeclineReason, OrderId, PaymentOutcome, UserId};
use stack::testing::{HeldInserts, eventually};

use crate::harness::{Orders, SOON, settlement};

const PAID: PaymentOutcome = PaymentOutcome::Paid;
const DECLINED: PaymentOutcome = PaymentOutcome::Declined {
    reason: DeclineReason::InsufficientFunds,
};

#[tokio::test]
async fn an_order_ends_as_payments_decided_and_its_final_event_is_published() {
    let orders = Orders::start().await;
    let payments = orders.payments().await;
    let (paid, declined) = (orders.placed().await, orders.placed().await);
    payments.publish(&settlement(paid, PAID)).await;
    payments.publish(&settlement(declined, DECLINED)).await;
    orders.until_status(paid, "FINISHED").await;
    orders.until_status(declined, "CANCELLED").await;

    assert_eq!(
        orders.row(declined).await.reason.as_deref(),
        Some("insufficient_funds")
    );
    for (id, subject) in [
        (paid, "gozon.orders.finished"),
        (declined, "gozon.orders.cancelled"),
    ] {
        let published = format!(
            "SELECT count(*) FROM outbox WHERE subject = '{subject}' AND payload LIKE '%{id}%' AND published_at IS NOT NULL"
        );
        orders
            .until("the final event is published", &published, 1)
            .await;
        let final_event = format!(
            "SELECT count(*) FROM outbox JOIN orders ON event_id = final_event_id WHERE subject = '{subject}' AND id = '{id}'"
        );
        assert_eq!(orders.count(&final_event).await, 1);
    }
}

#[tokio::test]
async fn a_repeated_answer_changes_nothing_and_publishes_nothing() {
    let orders = Orders::start().await;
    let payments = orders.payments().await;
    let id = orders.placed().await;
    let answer = settlement(id, PAID);
    payments.publish(&answer).await;
    orders.until_status(id, "FINISHED").await;
    let before = orders.row(id).await;

    payments.publish(&answer).await;
    payments.publish(&settlement(id, PAID)).await;
    orders
        .until(
            "both were received",
            "SELECT count(*) + sum(repeats)::bigint FROM inbox",
            3,
        )
        .await;
    assert_eq!(orders.row(id).await, before);
    assert_eq!(
        orders
            .count("SELECT count(*) FROM outbox WHERE n = 0")
            .await,
        2
    );
    assert_eq!(orders.count("SELECT count(*) FROM dead_letters").await, 0);
}

#[tokio::test]
async fn f32_ten_copies_of_every_answer_in_any_order_end_each_order_once() {
    let orders = Orders::start().await;
    let payments = orders.payments().await;
    let mut answers = Vec::new();
    for number in 0..20 {
        answers.push(settlement(
            orders.placed().await,
            if number % 2 == 0 { PAID } else { DECLINED },
        ));
    }
    // 7 and 200 have no common divisor: every copy is published once, far from the others.
    for step in 0..200 {
        payments.publish(&answers[step * 7 % 200 % 20]).await;
    }
    orders
        .until(
            "all copies were received",
            "SELECT count(*) + coalesce(sum(repeats), 0)::bigint FROM inbox",
            200,
        )
        .await;
    for (status, subject) in [
        ("FINISHED", "gozon.orders.finished"),
        ("CANCELLED", "gozon.orders.cancelled"),
    ] {
        assert_eq!(
            orders
                .count(&format!(
                    "SELECT count(*) FROM orders WHERE status = '{status}'"
                ))
                .await,
            10
        );
        assert_eq!(
            orders
                .count(&format!(
                    "SELECT count(*) FROM outbox WHERE subject = '{subject}'"
                ))
                .await,
            10
        );
    }
    assert_eq!(orders.count("SELECT count(*) FROM dead_letters").await, 0);
}

#[tokio::test]
async fn f33_an_answer_that_contradicts_is_quarantined_and_changes_nothing() {
    let orders = Orders::start().await;
    let payments = orders.payments().await;
    let (finished, new) = (orders.placed().await, orders.placed().await);
    payments.publish(&settlement(finished, PAID)).await;
    orders.until_status(finished, "FINISHED").await;

    let late = settlement(finished, DECLINED);
    let unknown = settlement(OrderId::mint(), PAID);
    let mut dearer = settlement(new, PAID);
    dearer.event.amount = Amount::new(11).unwrap();
    let mut another = settlement(new, PAID);
    another.event.user_id = UserId::parse("bob").unwrap();
    for answer in [&late, &unknown, &dearer, &another] {
        payments.publish(answer).await;
    }
    orders
        .until(
            "all are quarantined",
            "SELECT count(*) FROM dead_letters WHERE kind = 'quarantine'",
            4,
        )
        .await;
    let letters = DeadLetter::page(&orders.db, None, 1000).await.unwrap();
    for (answer, cause) in [
        (&late, "already final"),
        (&unknown, "there is no order"),
        (&dearer, "another user or amount"),
        (&another, "another user or amount"),
    ] {
        let letter = letters
            .iter()
            .find(|letter| letter.event_id == Some(answer.event_id.as_uuid()))
            .unwrap();
        assert!(letter.cause.contains(cause), "{}", letter.cause);
        assert_eq!(letter.key, Some(answer.event.order_id.as_uuid()));
    }
    assert_eq!(
        (orders.status(finished).await, orders.status(new).await),
        ("FINISHED".to_owned(), "NEW".to_owned())
    );
}

#[tokio::test]
async fn a_final_order_cannot_be_changed_and_no_order_deleted() {
    let orders = Orders::start().await;
    let id = orders.placed().await;
    let refused = async |statement: &str| orders.db.execute_unprepared(statement).await.is_err();
    assert!(
        refused("UPDATE orders SET amount = 1").await,
        "what was ordered never changes"
    );
    orders.payments().await.publish(&settlement(id, PAID)).await;
    orders.until_status(id, "FINISHED").await;
    for statement in [
        "UPDATE orders SET status = 'NEW', final_event_id = NULL",
        "UPDATE orders SET asks = 1",
        "DELETE FROM orders",
        "TRUNCATE orders",
    ] {
        assert!(refused(statement).await, "{statement}");
    }
}

#[tokio::test]
async fn a_waiting_request_is_answered_when_any_replica_ends_its_order() {
    let mut orders = Orders::start().await;
    let payments = orders.payments().await;
    let second = orders.replica().await;
    let replicas = [
        orders.http.clone(),
        stack::http::Http::new(format!("http://{}", second.address)),
    ];
    for replica in &replicas {
        // Either replica may receive the answer, so a request waits at each of them.
        for _ in 0..4 {
            let id = orders.placed().await;
            let path = format!("/v1/orders/{id}?wait=20");
            let begun = Instant::now();
            let (answer, ()) = tokio::join!(replica.get(&path), async {
                payments.publish(&settlement(id, PAID)).await;
            });
            assert_eq!(answer.unwrap().json()["status"], "FINISHED");
            assert!(begun.elapsed() < Duration::from_secs(10));
        }
    }
    let id = orders.placed().await;
    let begun = Instant::now();
    let answer = orders
        .http
        .get(&format!("/v1/orders/{id}?wait=1"))
        .await
        .unwrap();
    assert_eq!(
        (answer.status, &answer.json()["status"]),
        (200, &serde_json::json!("NEW")),
        "payments has published no answer"
    );
    assert!(begun.elapsed() >= Duration::from_secs(1));
    assert_eq!(
        orders
            .http
            .get(&format!("/v1/orders/{id}?wait=31"))
            .await
            .unwrap()
            .status,
        422
    );
    second.stop().await.unwrap();
    orders.stop().await;
}

#[tokio::test]
async fn a_crash_before_the_commit_leaves_nothing_and_the_order_ends_after_a_restart() {
    let mut orders = Orders::start().await;
    let payments = orders.payments().await;
    let id = orders.placed().await;
    let held = HeldInserts::blocked(orders.database.connect().await.unwrap(), "inbox");
    let held = held.await.unwrap();
    payments.publish(&settlement(id, PAID)).await;
    let waiting = "SELECT count(*) FROM pg_stat_activity
                   WHERE wait_event = 'PgSleep' AND datname = current_database()";
    orders
        .until("the service waits in its transaction", waiting, 1)
        .await;
    orders.crash().await;
    held.release().await.unwrap();
    assert_eq!(orders.count("SELECT count(*) FROM inbox").await, 0);

    orders.run().await;
    orders.until_status(id, "FINISHED").await;
    orders
        .until(
            "its final event is stored once",
            "SELECT count(*) FROM outbox WHERE subject = 'gozon.orders.finished'",
            1,
        )
        .await;
}

#[tokio::test]
async fn f38_poison_with_nul_or_very_large_keeps_its_real_cause() {
    let orders = Orders::start().await;
    let payments = orders.payments().await;
    for outcome in [r"pa\u0000id".to_owned(), "x".repeat(60_000)] {
        let id = orders.placed().await;
        let body =
            format!(r#"{{"order_id":"{id}","user_id":"alice","amount":10,"outcome":"{outcome}"}}"#);
        payments
            .publish_body(&settlement(id, PaymentOutcome::Paid), body.clone())
            .await;
        let letter = eventually("it is a dead letter", SOON, async || {
            let letters = DeadLetter::page(&orders.db, None, 1000).await.unwrap();
            letters.into_iter().find(|letter| letter.payload == body)
        })
        .await;
        assert!(
            letter.kind.to_string() == "poison" && letter.cause.contains("unknown variant"),
            "{}",
            letter.cause
        );
        assert!(
            letter.cause.chars().count() <= 1000 && !letter.cause.contains('\0'),
            "{}",
            letter.cause
        );
        let again = orders
            .http
            .post(
                &format!("/v1/ops/dead-letters/{}/replay", letter.id),
                None,
                &json!({}),
            )
            .await
            .unwrap();
        assert_eq!(
            (again.status, again.json()["outcome"].as_str()),
            (200, Some("poison")),
            "{}",
            again.text()
        );
    }
}
