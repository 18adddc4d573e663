//! Streams, consumers and messages are shown; old events are published again.

use std::time::Duration;

use ops::audit::FindingKind;
use ops::outbox;
use ops::streams::{ConsumerSummary, consumers, list, peek, tail};
use sea_orm::{ConnectionTrait as _, DbBackend, Statement};
use serde_json::json;
use stack::testing::eventually;
use time::OffsetDateTime;

use crate::harness::{SOON, TestShop};

/// The broker's duplicate window.
const WINDOW: Duration = Duration::from_secs(120);
const FINISHED: &str = "gozon.orders.finished";

impl TestShop {
    async fn paid(&self) -> String {
        let id = self.place().await;
        eventually("the order is paid", SOON, async || {
            (self.order(&id).await["status"] == "FINISHED").then_some(())
        })
        .await;
        id
    }

    async fn finished(&self, number: usize) -> Vec<ops::streams::StoredMessage> {
        eventually("the events are in the stream", SOON, async || {
            let found = peek(self.broker.jetstream(), "ORDERS", 100, Some(FINISHED))
                .await
                .ok()?;
            (found.len() == number).then_some(found)
        })
        .await
    }

    /// Rows are marked as published a little later.
    async fn all_marked(&self) {
        eventually("all rows are marked as published", SOON, async || {
            let query = "SELECT 1 FROM outbox WHERE published_at IS NULL LIMIT 1";
            let query = Statement::from_string(DbBackend::Postgres, query);
            let found = self.databases.orders.query_one_raw(query).await.ok()?;
            found.is_none().then_some(())
        })
        .await;
    }

    /// The consumers of the services, without the gateway's ephemeral one for live events.
    async fn consumers(&self) -> Option<Vec<ConsumerSummary>> {
        let found = consumers(self.broker.jetstream(), None).await.ok()?;
        Some(found.into_iter().filter(|one| one.durable).collect())
    }

    async fn ephemeral_consumers(&self) -> usize {
        let found = consumers(self.broker.jetstream(), Some("ORDERS"))
            .await
            .unwrap();
        found.iter().filter(|one| !one.durable).count()
    }
}

#[tokio::test]
async fn streams_consumers_and_messages_are_shown() {
    let shop = TestShop::start().await;
    let id = shop.paid().await;
    let jetstream = shop.broker.jetstream();
    let newest = shop.finished(1).await.remove(0);
    assert_eq!(
        (
            newest.headers["ce-subject"].as_str(),
            &newest.body["order_id"]
        ),
        (id.as_str(), &json!(id))
    );

    let found = list(jetstream).await.unwrap();
    assert_eq!(
        found
            .iter()
            .map(|stream| stream.name.as_str())
            .collect::<Vec<_>>(),
        ["DLQ", "ORDERS", "PAYMENTS"]
    );
    assert_eq!(
        (found[1].last_sequence, found[1].max_bytes),
        (newest.sequence, 1 << 30)
    );
    let found = eventually("all messages are acknowledged", SOON, async || {
        let found = shop.consumers().await.unwrap();
        found
            .iter()
            .all(|one| (one.lag, one.unacked, one.redelivered) == (0, 0, 0))
            .then_some(found)
    })
    .await;
    assert_eq!(
        found
            .iter()
            .map(|one| one.name.as_str())
            .collect::<Vec<_>>(),
        ["payments-order-placed", "orders-payment-settled"]
    );
    let error = consumers(jetstream, Some("ORDRES"))
        .await
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        "there is no stream ORDRES; the streams are DLQ, ORDERS, PAYMENTS"
    );

    // The gateway has a consumer only while somebody listens to live events.
    let listed = list(jetstream).await.unwrap().remove(1);
    assert_eq!(listed.consumers, 1);
    let mut followed = Vec::new();
    let follow = tail(jetstream, "ORDERS", Some(FINISHED), |message| {
        followed.push(message.headers["ce-subject"].clone());
        false
    });
    let order = async {
        // The consumer of `tail` must exist before the order is placed.
        eventually("`tail` follows the stream", SOON, async || {
            (shop.ephemeral_consumers().await == 1).then_some(())
        })
        .await;
        shop.paid().await
    };
    let (tail_result, second) = tokio::join!(follow, order);
    tail_result.unwrap();
    assert_eq!(followed, [second]);
}

#[tokio::test]
async fn after_the_broker_was_wiped_old_events_are_resent_and_change_nothing() {
    let mut shop = TestShop::start().await;
    let began = OffsetDateTime::now_utc() - time::Duration::HOUR;
    let ids = [shop.paid().await, shop.paid().await];
    shop.finished(2).await;
    shop.all_marked().await;
    shop.stack.system.kill("nats").await.unwrap();
    shop.stack.system.wipe_nats().unwrap();
    shop.stack.system.start("nats").await.unwrap();
    shop.finished(0).await;

    let counted = outbox::resend(&shop.databases, began, Some(FINISHED), true, WINDOW)
        .await
        .unwrap();
    assert_eq!(
        counted
            .iter()
            .map(|one| (one.messages, one.recent))
            .collect::<Vec<_>>(),
        [(2, 2), (0, 0)]
    );
    let without_memory =
        outbox::resend(&shop.databases, began, Some(FINISHED), true, Duration::ZERO)
            .await
            .unwrap();
    assert_eq!(without_memory[0].recent, 0);
    shop.finished(0).await;
    outbox::resend(&shop.databases, began, Some(FINISHED), false, WINDOW)
        .await
        .unwrap();
    let again = shop.finished(2).await;
    assert_eq!(
        again
            .iter()
            .map(|message| message.headers["ce-subject"].as_str())
            .collect::<Vec<_>>(),
        [&ids[0], &ids[1]]
    );

    // All subjects, including those that the services read: they recognise duplicates.
    outbox::resend(&shop.databases, began, None, false, WINDOW)
        .await
        .unwrap();
    eventually(
        "all events are published and acknowledged",
        SOON,
        async || {
            let pending = outbox::status(&shop.databases)
                .await
                .unwrap()
                .iter()
                .any(|outbox| outbox.pending > 0);
            let taken = shop.consumers().await?;
            (!pending
                && taken.len() == 2
                && taken.iter().all(|one| (one.lag, one.unacked) == (0, 0)))
            .then_some(())
        },
    )
    .await;
    assert_eq!(shop.balance().await, 40);
    assert_eq!(shop.findings().await, []);
}

#[tokio::test]
async fn pruned_rows_are_no_finding_even_if_older_rows_were_resent() {
    let mut shop = TestShop::start().await;
    for _ in 0..2 {
        shop.paid().await;
    }
    shop.finished(2).await;
    for name in ["orders", "payments"] {
        shop.stack.system.stop(name).await.unwrap();
    }
    // As after a resend: these rows are kept longer than rows that were created after them.
    let again = format!(
        "UPDATE outbox SET published_at = now() + interval '1 hour' WHERE subject = '{FINISHED}'"
    );
    shop.databases
        .orders
        .execute_unprepared(&again)
        .await
        .unwrap();
    for (name, db) in [
        ("orders", shop.databases.orders.clone()),
        ("payments", shop.databases.payments.clone()),
    ] {
        let environment = [("GOZON_KEEP_SECONDS", "0")];
        shop.stack.system.spawn_with(name, &environment).unwrap();
        let left = "SELECT count(*) FROM inbox";
        eventually("old rows are deleted", SOON, async || {
            let statement = Statement::from_string(DbBackend::Postgres, left);
            let row = db.query_one_raw(statement).await.unwrap().unwrap();
            (row.try_get_by_index::<i64>(0).unwrap() == 0).then_some(())
        })
        .await;
        shop.stack.system.stop(name).await.unwrap();
    }
    assert_eq!(shop.findings().await, []);

    // An event of a newer order must not be missing.
    for name in ["orders", "payments"] {
        shop.stack.system.start(name).await.unwrap();
    }
    shop.paid().await;
    let delete_event = "DELETE FROM outbox WHERE event_id = (SELECT placed_event_id FROM orders ORDER BY id DESC LIMIT 1)";
    shop.databases
        .orders
        .execute_unprepared(delete_event)
        .await
        .unwrap();
    assert_eq!(shop.findings().await, [FindingKind::MissingEvent]);
}
