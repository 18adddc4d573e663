//! Committed rows are published, and marked only after their PubAck.

use std::time::Duration;

use sea_orm::ConnectionTrait as _;
use shared_contracts::header;
use stack::testing::eventually;

use crate::harness::{Outbox, SOON};

/// Asserts that each row has the stream sequence of its message.
async fn assert_in_place(outbox: &Outbox) {
    for row in outbox.rows().await {
        let sequence = row.stream_sequence.unwrap().try_into().unwrap();
        let message = outbox.message(sequence).await;
        assert_eq!(
            message.headers.get(header::ID).unwrap().as_str(),
            row.event_id.to_string(),
            "message {sequence}"
        );
    }
}

#[tokio::test]
async fn many_rows_are_stored_as_batches_and_each_is_marked_with_its_place() {
    let outbox = Outbox::new().await;
    outbox.leave(620).await;
    let flow = outbox.flow().await;
    outbox.until_published(620).await;
    assert_eq!(outbox.messages().await, 620);
    assert!(
        outbox
            .message(300)
            .await
            .headers
            .get("Nats-Batch-Id")
            .is_some(),
        "as one batch"
    );
    assert_in_place(&outbox).await;

    // A few rows are sent concurrently.
    flow.enqueue(3).await;
    outbox.until_published(623).await;
    assert!(
        outbox
            .message(622)
            .await
            .headers
            .get("Nats-Batch-Id")
            .is_none()
    );
    assert_in_place(&outbox).await;
}

#[tokio::test]
async fn a_batch_that_the_broker_refuses_for_a_duplicate_is_published_singly() {
    let outbox = Outbox::new().await;
    let flow = outbox.flow().await;
    flow.enqueue(1).await;
    outbox.until_published(1).await;
    // The state after a crash between PubAck and mark.
    outbox.shutdown.cancel();
    flow.ended.await.unwrap().unwrap();
    outbox
        .execute("UPDATE outbox SET published_at = NULL, stream_sequence = NULL, attempts = 0")
        .await;
    outbox.leave(99).await;

    let outbox = Outbox {
        shutdown: tokio_util::sync::CancellationToken::new(),
        ..outbox
    };
    let _flow = outbox.flow().await;
    outbox.until_published(100).await;
    assert_eq!(outbox.messages().await, 100, "no message is stored twice");
    assert_in_place(&outbox).await;
}

#[tokio::test]
async fn f19_a_row_that_the_broker_never_takes_delays_no_other_row() {
    let outbox = Outbox::new().await;
    outbox.leave(1).await;
    outbox
        .execute("UPDATE outbox SET payload = repeat('x', 70000)")
        .await;
    let flow = outbox.flow().await;
    flow.enqueue(100).await;
    outbox.until_published(100).await;
    // After the row has failed a few times, newer rows do not wait for it.
    eventually("the row was retried", SOON, async || {
        (outbox.rows().await[0].attempts >= 5).then_some(())
    })
    .await;
    flow.enqueue(1).await;
    let rows = outbox.until_published(101).await;
    assert!(
        rows[0].published_at.is_none(),
        "the broker does not accept the row"
    );
    assert!(flow.health("relay").await.starts_with("[~]"));

    outbox
        .execute("UPDATE outbox SET payload = '{}' WHERE published_at IS NULL")
        .await;
    outbox.until_published(102).await;
    eventually("the relay is healthy again", SOON, async || {
        flow.health("relay").await.starts_with("[+]").then_some(())
    })
    .await;
}

#[tokio::test]
async fn rows_whose_stream_cannot_be_created_delay_no_other_row() {
    let outbox = Outbox::new().await;
    outbox.leave(600).await;
    outbox.execute("UPDATE outbox SET subject = 'gozon.dlq.orders', headers = '{\"Nats-Expected-Stream\":\"DLQ\"}'").await;
    let too_large = format!("--dlq-max-bytes={}", 1_i64 << 50);
    let flow = outbox.flow_with(&[&too_large]).await;
    eventually("all were tried", SOON, async || {
        outbox
            .rows()
            .await
            .iter()
            .all(|row| row.attempts > 0)
            .then_some(())
    })
    .await;
    let told = flow.health("streams").await;
    assert!(told.contains("no room for stream DLQ"), "{told}");
    for number in 1..=20 {
        flow.enqueue(1).await;
        outbox.until_published(number).await;
    }
    assert_eq!(outbox.messages().await, 20);
}

#[tokio::test]
async fn f17_several_relays_publish_a_backlog_once() {
    let outbox = Outbox::new().await;
    outbox.leave(3000).await;
    let mut flows = Vec::new();
    for _ in 0..5 {
        flows.push(outbox.flow().await);
    }
    outbox.until_published(3000).await;
    assert_eq!(outbox.messages().await, 3000);
    assert!(
        outbox.rows().await.iter().all(|row| row.attempts == 1),
        "each row was tried once"
    );
    outbox.shutdown.cancel();
    for flow in flows {
        flow.ended.await.unwrap().unwrap();
    }
}

/// The transaction that began first commits last, and does not wake the relay (F20, F21).
#[tokio::test]
async fn f20_f21_rows_that_commit_late_and_unannounced_are_published_too() {
    let outbox = Outbox::new().await;
    let flow = outbox.flow().await;
    let late = outbox.uncommitted(2).await;
    flow.enqueue(5).await;
    let rows = outbox.until_published(5).await;
    outbox.until_idle().await;
    late.commit().await.unwrap();
    let after = outbox.until_published(7).await;
    assert!(
        after[1].event_id < rows[0].event_id,
        "the late rows have the oldest ids"
    );
    assert_in_place(&outbox).await;
}

/// Ids do not tell when a row was committed.
#[tokio::test]
async fn f20_a_row_whose_id_is_much_older_than_what_was_published_is_published_too() {
    let outbox = Outbox::new().await;
    let flow = outbox.flow().await;
    flow.enqueue(5).await;
    outbox.until_published(5).await;
    outbox
        .execute(
            "INSERT INTO outbox (event_id, n, subject, headers, payload)
             SELECT '018cc251-f400-7000-8000-000000000001', 0, subject, headers, payload FROM outbox LIMIT 1",
        )
        .await;
    outbox.until_published(6).await;
    assert_in_place(&outbox).await;
}

/// Handed-off rows are published at once. Only the others are polled, and not before their minimum
/// age.
#[tokio::test]
async fn rows_that_were_handed_off_do_not_wait_for_a_poll_and_the_others_are_published_once() {
    let outbox = Outbox::new().await;
    let flow = outbox.flow().await;
    for round in 1..=10 {
        // The rows are too young for polling, however slow this machine is, until the test changes
        // their age.
        let txn = outbox.uncommitted(10).await;
        txn.execute_unprepared(
            "UPDATE outbox SET created_at = now() + interval '1 hour' WHERE attempts = 0",
        )
        .await
        .unwrap();
        txn.commit().await.unwrap();
        flow.enqueue(10).await;
        outbox.until_published(round * 20 - 10).await;
        outbox.execute("UPDATE outbox SET created_at = now() - interval '1 minute' WHERE published_at IS NULL").await;
        outbox.until_published(round * 20).await;
    }
    assert_eq!(outbox.messages().await, 200);
    // A starting relay scans for rows of any age, so both ways may have published the first rows.
    let rows = outbox.rows().await;
    let tried_once = rows.iter().filter(|row| row.attempts == 1).count();
    assert!(
        tried_once >= 150,
        "only {tried_once} of 200 rows were tried once"
    );
    let at_once = rows
        .iter()
        .filter(|row| row.published_at.unwrap() - row.created_at < Duration::from_secs(2))
        .count();
    assert!(
        at_once >= 50,
        "only {at_once} of 100 rows did not wait for a poll"
    );
}

/// Rows that the in-memory queue drops are not lost.
#[tokio::test]
async fn rows_handed_off_while_the_broker_is_away_are_published_when_it_returns() {
    let mut outbox = Outbox::new().await;
    let flow = outbox.flow().await;
    flow.enqueue(1).await;
    outbox.until_published(1).await;
    outbox.broker.kill().await.unwrap();
    for _ in 0..60 {
        flow.enqueue(100).await;
    }
    outbox.broker.up().await.unwrap();
    outbox.until_published(6001).await;
    assert_in_place(&outbox).await;
}
