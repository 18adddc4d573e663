//! Dead letters are shown, replayed with and without effect, and dropped.

use messaging::{ReplayOutcome, TopologySettings};
use ops::audit::FindingKind;
use ops::topology::{self, Apply};
use ops::{dead_letters, outbox};
use sea_orm::ConnectionTrait as _;
use serde_json::json;
use shared_contracts::{
    Amount, DeclineReason, Event as _, EventId, PaymentOutcome, PaymentSettled, SPEC_VERSION,
    UserId, header,
};
use stack::testing::eventually;

use crate::harness::{SOON, TestShop};

#[tokio::test]
async fn f51_what_could_not_be_applied_is_applied_by_a_replay_once() {
    let shop = TestShop::start().await;
    let execute = async |sql: &str| {
        shop.databases
            .payments
            .execute_unprepared(sql)
            .await
            .unwrap()
    };
    execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             RAISE EXCEPTION 'a bug of ours' USING ERRCODE = '22000';
         END $$;
         CREATE TRIGGER refuse BEFORE INSERT ON payments FOR EACH ROW EXECUTE FUNCTION refuse()",
    )
    .await;
    let id = shop.place().await;
    let letter = shop.letter(|_| true).await;
    assert!(
        letter.cause.contains("a bug of ours")
            && letter.kind.to_string() == "poison"
            && letter.waits,
        "{letter:?}"
    );
    assert!(
        letter.headers.contains("ce-id: ") && letter.payload.contains(&id),
        "{letter:?}"
    );
    assert_eq!(
        shop.findings().await,
        [FindingKind::Quarantined, FindingKind::DeadLetter]
    );

    // While the bug exists, a replayed dead letter comes back.
    shop.replay(&letter).await;
    let back = shop
        .letter(|letter| letter.waits && letter.replays == 1)
        .await;
    assert!(
        back.times > letter.times && back.id == letter.id,
        "{back:?}"
    );

    // The bug is fixed.
    execute("DROP TRIGGER refuse ON payments").await;
    let dry_run = shop.dry_run(&back).await;
    assert_eq!(
        dry_run,
        (ReplayOutcome::Applied, "The order is paid.".to_owned())
    );
    assert_eq!(shop.balance().await, 100, "a dry run changes nothing");
    shop.replay(&back).await;
    eventually("the order is paid", SOON, async || {
        (shop.order(&id).await["status"] == "FINISHED").then_some(())
    })
    .await;
    assert_eq!(shop.balance().await, 70);
    let done = shop
        .letter(|letter| !letter.waits && letter.replays == 2)
        .await;
    assert_eq!(
        shop.findings().await,
        [],
        "a resolved dead letter is no finding"
    );

    // Replayed once more by mistake: it is a duplicate and has no effect.
    let (outcome, _) = shop.dry_run(&done).await;
    assert_eq!(outcome, ReplayOutcome::NothingToDo);
    shop.replay(&done).await;
    let repeats = "SELECT sum(repeats)::bigint FROM inbox";
    eventually("the duplicate is recorded", SOON, async || {
        let statement = sea_orm::Statement::from_string(sea_orm::DbBackend::Postgres, repeats);
        let repeats: Option<i64> = shop
            .databases
            .payments
            .query_one_raw(statement)
            .await
            .unwrap()
            .unwrap()
            .try_get_by_index(0)
            .unwrap();
        (repeats.unwrap_or(0) >= 1).then_some(())
    })
    .await;
    assert_eq!(shop.balance().await, 70);

    dead_letters::remove(&shop.databases, &done).await.unwrap();
    assert!(
        dead_letters::list(&shop.databases)
            .await
            .unwrap()
            .is_empty()
    );
    assert_eq!(shop.findings().await, []);
}

#[tokio::test]
async fn a_contradicting_message_comes_back_after_each_replay() {
    let mut shop = TestShop::start().await;
    let id = shop.place().await;
    eventually("the order is paid", SOON, async || {
        (shop.order(&id).await["status"] == "FINISHED").then_some(())
    })
    .await;

    // Publish a forged message with the broker's credentials: the same order, another amount.
    let mut headers = async_nats::HeaderMap::new();
    for (name, value) in [
        ("ce-specversion", "1.0"),
        ("ce-type", "gozon.order.placed.v1"),
        ("ce-id", "01933f3c-7d5a-7b60-9d6f-000000000001"),
        ("ce-subject", id.as_str()),
    ] {
        headers.insert(name, value);
    }
    let forged = json!({ "order_id": id, "user_id": "alice", "amount": 99 }).to_string();
    shop.broker
        .jetstream()
        .publish_with_headers("gozon.orders.placed", headers, forged.into())
        .await
        .unwrap()
        .await
        .unwrap();
    let letter = shop.letter(|_| true).await;
    assert_eq!(
        (
            letter.kind.to_string().as_str(),
            letter.service,
            letter.key.unwrap().to_string()
        ),
        ("quarantine", "payments", id)
    );
    let (outcome, why) = shop.dry_run(&letter).await;
    assert_eq!(outcome, ReplayOutcome::Quarantine);
    assert!(why.contains("another user or amount"), "{why}");
    shop.replay(&letter).await;
    let back = shop
        .letter(|letter| letter.waits && letter.replays == 1)
        .await;
    assert_eq!(back.times, 2);
    assert_eq!(shop.balance().await, 70);
    shop.stack.system.stop_all().await.unwrap();
}

#[tokio::test]
async fn a_dry_run_reports_an_answer_with_another_reason_as_a_contradiction() {
    let mut shop = TestShop::start().await;
    let declined = loop {
        let id = shop.place().await;
        let order = eventually("the order is final", SOON, async || {
            let order = shop.order(&id).await;
            (order["status"] != "NEW").then_some(order)
        })
        .await;
        if order["status"] == "CANCELLED" {
            break order;
        }
    };
    let settled = PaymentSettled {
        order_id: declined["id"].as_str().unwrap().parse().unwrap(),
        user_id: UserId::parse("alice").unwrap(),
        amount: Amount::new(30).unwrap(),
        outcome: PaymentOutcome::Declined {
            reason: DeclineReason::NoAccount,
        },
    };
    let mut headers = async_nats::HeaderMap::new();
    for (name, value) in [
        (header::SPEC_VERSION, SPEC_VERSION),
        (header::TYPE, PaymentSettled::TYPE),
        (header::ID, &EventId::mint().to_string()),
        (header::SUBJECT, declined["id"].as_str().unwrap()),
    ] {
        headers.insert(name, value);
    }
    let body = serde_json::to_string(&settled).unwrap();
    shop.broker
        .jetstream()
        .publish_with_headers(PaymentSettled::SUBJECT, headers, body.into())
        .await
        .unwrap()
        .await
        .unwrap();
    let letter = shop.letter(|letter| letter.service == "orders").await;
    let (outcome, why) = shop.dry_run(&letter).await;
    assert_eq!(outcome, ReplayOutcome::Quarantine);
    assert!(why.contains("already final"), "{why}");
    shop.stack.system.stop_all().await.unwrap();
}

#[tokio::test]
async fn a_changed_stream_is_reported_and_corrected() {
    let shop = TestShop::start().await;
    let settings = TopologySettings::default();
    let jetstream = shop.broker.jetstream();
    let check = async |apply| {
        let items = topology::check(jetstream, &settings, apply).await.unwrap();
        items
            .into_iter()
            .map(|item| (item.name, item.there, item.drift))
            .collect::<Vec<_>>()
    };
    let names = [
        "stream ORDERS",
        "stream PAYMENTS",
        "stream DLQ",
        "consumer payments-order-placed",
        "consumer orders-payment-settled",
    ];
    let expected: Vec<_> = names
        .map(|name| (name.to_owned(), true, Vec::<String>::new()))
        .to_vec();
    eventually("the topology exists", SOON, async || {
        (check(Apply::CheckOnly).await == expected).then_some(())
    })
    .await;

    let mut config = orders::STREAMS[0].config(&settings);
    config.max_bytes = 1_000_000;
    jetstream.update_stream(config).await.unwrap();
    let drifted = check(Apply::CheckOnly).await;
    assert_eq!(drifted[0].2, ["max_bytes is 1000000, not 1073741824"]);
    let corrected = topology::check(jetstream, &settings, Apply::Grow)
        .await
        .unwrap();
    assert_eq!(
        corrected[0].changed,
        ["max_bytes is 1000000, not 1073741824"]
    );
    assert!(
        corrected[1..].iter().all(|item| item.changed.is_empty()),
        "{corrected:?}"
    );
    assert_eq!(check(Apply::CheckOnly).await, expected);

    // With a smaller limit than the services have, nothing is changed without --shrink.
    let smaller = TopologySettings {
        stream_max_bytes: 1_000_000,
        ..settings.clone()
    };
    let refused = topology::check(jetstream, &smaller, Apply::Grow)
        .await
        .unwrap_err()
        .to_string();
    assert!(
        refused.contains("stream ORDERS has max_bytes 1073741824") && refused.contains("--shrink"),
        "{refused}"
    );
    assert_eq!(check(Apply::CheckOnly).await, expected);
    topology::check(jetstream, &smaller, Apply::Shrink)
        .await
        .unwrap();
    assert_eq!(check(Apply::CheckOnly).await[0].2, drifted[0].2);
}

#[tokio::test]
async fn an_order_is_shown_with_all_its_rows() {
    let shop = TestShop::start().await;
    let id = shop.place().await;
    eventually("the order is paid", SOON, async || {
        (shop.order(&id).await["status"] == "FINISHED").then_some(())
    })
    .await;
    let shown = eventually("all events are published", SOON, async || {
        let shown = ops::order::find(&shop.databases, id.parse().unwrap())
            .await
            .unwrap();
        (!shown["ends"][0]["published_at"].is_null()).then_some(shown)
    })
    .await;
    assert_eq!(
        (&shown["order"]["status"], &shown["decision"]["outcome"]),
        (&json!("FINISHED"), &json!("paid"))
    );
    for list in [
        "requests",
        "taken_by_payments",
        "debits",
        "answers",
        "taken_by_orders",
        "ends",
    ] {
        assert_eq!(shown[list].as_array().unwrap().len(), 1, "{list}");
    }
    assert_eq!(
        shown.as_object().unwrap().len(),
        9,
        "`gozon order` shows nine tables"
    );
    assert!(
        ops::order::find(&shop.databases, uuid::Uuid::nil())
            .await
            .is_err()
    );
    let outboxes = outbox::status(&shop.databases).await.unwrap();
    assert!(
        outboxes
            .iter()
            .all(|outbox| outbox.pending == 0 && outbox.oldest_seconds == 0.0)
    );
}
