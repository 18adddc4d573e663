//! A message that cannot be applied becomes a dead letter with its cause and delays no other.

use async_nats::HeaderMap;
use messaging::DeadLetter;
use shared_contracts::{Amount, UserId, header};
use stack::testing::eventually;

use crate::harness::{Payments, Request, SOON, request};

async fn dead_letters(payments: &Payments, number: usize) -> Vec<DeadLetter> {
    eventually("the dead letters are there", SOON, async || {
        let letters = DeadLetter::page(&payments.db, None, 1000).await.unwrap();
        (letters.len() == number).then_some(letters)
    })
    .await
}

async fn publish_all(payments: &Payments, orders: &[Request]) {
    for order in orders {
        payments.publish(order).await;
    }
}

fn without(name: &str, request: &Request) -> HeaderMap {
    with(name, None, request)
}

fn with(name: &str, value: Option<&str>, request: &Request) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (other, values) in request.headers().iter() {
        if other.to_string() != name {
            headers.insert(other.clone(), values[0].clone());
        }
    }
    if let Some(value) = value {
        headers.insert(name, value);
    }
    headers
}

#[tokio::test]
async fn f37_poison_in_a_batch_becomes_a_dead_letter_and_the_rest_is_applied() {
    let payments = Payments::start().await;
    let body = |request: &Request| serde_json::to_string(&request.event).unwrap();
    let spare: Vec<Request> = (0..10).map(|_| request("alice", 1)).collect();
    let poison = [
        (
            HeaderMap::new(),
            r#"{"stream":"ORDERS","seq":1}"#.to_owned(),
            "header ce-id is missing",
        ),
        (
            with(header::ID, Some("7"), &spare[1]),
            body(&spare[1]),
            "header ce-id is not a UUID",
        ),
        (
            without(header::TYPE, &spare[2]),
            body(&spare[2]),
            "header ce-type is missing",
        ),
        (
            with(header::TYPE, Some("gozon.order.placed.v2"), &spare[3]),
            body(&spare[3]),
            "gozon.order.placed.v2",
        ),
        (
            with(header::SPEC_VERSION, Some("0.3"), &spare[4]),
            body(&spare[4]),
            "CloudEvents version",
        ),
        (
            with(header::ASK, Some("many"), &spare[5]),
            body(&spare[5]),
            "Gozon-Ask",
        ),
        (
            with(header::SUBJECT, Some("another"), &spare[6]),
            body(&spare[6]),
            "the body is about",
        ),
        (spare[7].headers(), "not json".to_owned(), "expected"),
        (
            spare[8].headers(),
            body(&spare[8]).replace("\"amount\":1", "\"amount\":-1"),
            "must be an integer from 1",
        ),
        (
            spare[9].headers(),
            body(&spare[9]).replace("\"amount\":1", "\"amount\":1.5"),
            "floating point",
        ),
    ];
    let good: Vec<Request> = poison.iter().map(|_| request("nobody", 1)).collect();
    payments
        .as_one_batch(20, async || {
            for ((headers, body, _), order) in poison.iter().zip(&good) {
                payments.publish_raw(headers.clone(), body.clone()).await;
                payments.publish(order).await;
            }
        })
        .await;

    let letters = dead_letters(&payments, poison.len()).await;
    for order in &good {
        assert_eq!(
            payments.decision(order).await.reason.as_deref(),
            Some("no_account")
        );
    }
    for (_, body, cause) in &poison {
        let letter = letters
            .iter()
            .find(|letter| letter.payload == *body)
            .unwrap();
        assert!(letter.cause.contains(cause), "{}", letter.cause);
        let named = spare
            .iter()
            .zip(&poison)
            .find(|(_, (_, other, _))| other == body)
            .map(|(order, _)| order.order_id());
        let readable = !cause.contains("ce-id is missing") && !cause.contains("the body is about");
        assert_eq!(letter.key, named.filter(|_| readable), "{cause}");
        assert_eq!(
            (
                letter.kind.to_string().as_str(),
                letter.times,
                letter.stream.as_str()
            ),
            ("poison", 1, "ORDERS")
        );
        assert!(letter.stream_sequence > 0 && letter.delivered == 1);
    }
    assert_eq!(
        payments.decisions().await,
        good.len() as u64 + 1,
        "the valid orders, and the plug"
    );
    // Poison leaves no inbox row. Otherwise a later re-ask would count as a repetition.
    assert_eq!(
        payments.count("SELECT count(*) FROM inbox").await,
        good.len() as i64 + 1
    );
    // Each dead letter has one copy for tools.
    assert_eq!(
        payments
            .count("SELECT count(*) FROM outbox WHERE subject = 'gozon.dlq.payments'")
            .await,
        poison.len() as i64
    );
    payments.until_quiet().await;
}

#[tokio::test]
async fn f38_the_same_poison_again_is_the_same_dead_letter() {
    let payments = Payments::start().await;
    let order = request("alice", 1);
    for _ in 0..3 {
        payments.publish_raw(order.headers(), "not json").await;
        payments.publish_raw(HeaderMap::new(), "no event").await;
    }
    eventually("all were counted", SOON, async || {
        (payments
            .count("SELECT coalesce(sum(times), 0)::bigint FROM dead_letters")
            .await
            == 6)
            .then_some(())
    })
    .await;
    assert_eq!(payments.count("SELECT count(*) FROM dead_letters").await, 2);
    assert_eq!(payments.count("SELECT count(*) FROM outbox").await, 2);
}

#[tokio::test]
async fn f33_another_amount_or_user_for_a_decided_order_is_quarantined() {
    let payments = Payments::start().await;
    payments.open_account("alice", 1000).await;
    payments.open_account("bob", 1000).await;
    let order = request("alice", 10);
    payments.publish(&order).await;
    payments.decision(&order).await;

    let mut dearer = order.clone();
    dearer.event.amount = Amount::new(999).unwrap();
    let mut another = Request {
        event_id: shared_contracts::EventId::mint(),
        ..order.clone()
    };
    another.event.user_id = UserId::parse("bob").unwrap();
    payments.publish(&dearer).await;
    payments.publish(&another).await;

    for letter in dead_letters(&payments, 2).await {
        assert_eq!(
            (letter.kind.to_string().as_str(), letter.key),
            ("quarantine", Some(order.order_id()))
        );
    }
    assert_eq!(
        (
            payments.balance("alice").await,
            payments.balance("bob").await
        ),
        (990, 1000)
    );
    assert_eq!(
        payments.answers(&order).await,
        3,
        "one answer, and a copy of each dead letter"
    );
    payments.assert_books_balance().await;
}

#[tokio::test]
async fn a_message_that_the_database_always_refuses_delays_no_other_message() {
    let payments = Payments::start().await;
    let orders: Vec<Request> = (0..20)
        .map(|number| request(if number == 7 { "guilty" } else { "innocent" }, 1))
        .collect();
    payments
        .execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                 RAISE EXCEPTION 'the guilty one' USING ERRCODE = '22000';
             END $$;
             CREATE TRIGGER refuse BEFORE INSERT ON payments FOR EACH ROW WHEN (NEW.user_id = 'guilty') EXECUTE FUNCTION refuse()",
        )
        .await;
    payments
        .as_one_batch(20, async || publish_all(&payments, &orders).await)
        .await;

    let letters = dead_letters(&payments, 1).await;
    assert!(
        letters[0].cause.contains("the guilty one"),
        "{}",
        letters[0].cause
    );
    assert_eq!(letters[0].event_id, Some(orders[7].event_id.as_uuid()));
    for order in orders
        .iter()
        .filter(|order| order.event.user_id.as_str() == "innocent")
    {
        payments.decision(order).await;
    }
    assert_eq!(payments.decisions().await, 20, "19, and the plug");
}

#[tokio::test]
async fn a_damaged_account_delays_only_its_own_orders_and_they_are_paid_when_it_is_repaired() {
    let payments = Payments::start().await;
    payments.open_account("alice", 100).await;
    payments.open_account("bob", 100).await;
    // As after a restored backup: alice's next entry number exists already, so every attempt fails.
    payments
        .execute("UPDATE accounts SET entry_no = 0 WHERE user_id = 'alice'")
        .await;
    let (stuck, good) = (request("alice", 1), request("bob", 1));
    payments
        .as_one_batch(2, async || {
            publish_all(&payments, &[stuck.clone(), good.clone()]).await
        })
        .await;
    assert_eq!(payments.decision(&good).await.outcome, "paid");
    let letters = dead_letters(&payments, 1).await;
    assert_eq!(
        (letters[0].kind.to_string().as_str(), letters[0].key),
        ("poison", Some(stuck.order_id()))
    );
    assert!(
        letters[0].cause.contains("duplicate key"),
        "{}",
        letters[0].cause
    );

    payments
        .execute("UPDATE accounts SET entry_no = 1 WHERE user_id = 'alice'")
        .await;
    payments.publish(&stuck.asked(1)).await;
    assert_eq!(payments.decision(&stuck).await.outcome, "paid");
    payments.assert_books_balance().await;
}

#[tokio::test]
async fn f11_a_serialization_failure_or_deadlock_runs_the_batch_again_and_is_no_poison() {
    let payments = Payments::start().await;
    let orders: Vec<Request> = (0..20).map(|_| request("nobody", 1)).collect();
    payments
        .execute(
            "CREATE SEQUENCE tries;
             CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ DECLARE try bigint := nextval('tries'); BEGIN
                 IF try = 2 THEN RAISE EXCEPTION 'try again' USING ERRCODE = '40001'; END IF;
                 IF try = 3 THEN RAISE EXCEPTION 'try again' USING ERRCODE = '40P01'; END IF;
                 IF try = 4 THEN RAISE EXCEPTION 'try again' USING ERRCODE = '57P01'; END IF;
                 RETURN NULL;
             END $$;
             CREATE TRIGGER refuse AFTER INSERT ON payments FOR EACH STATEMENT EXECUTE FUNCTION refuse();
             GRANT ALL ON SEQUENCE tries TO PUBLIC",
        )
        .await;
    payments
        .as_one_batch(20, async || publish_all(&payments, &orders).await)
        .await;

    for order in &orders {
        payments.decision(order).await;
    }
    assert_eq!(
        payments.count("SELECT last_value FROM tries").await,
        5,
        "the plug, then one batch that was tried four times"
    );
    assert_eq!(payments.count("SELECT count(*) FROM dead_letters").await, 0);
    assert_eq!(payments.count("SELECT count(*) FROM outbox").await, 21);
}
