//! An order that stays NEW is re-asked, for ever, at doubling intervals.

use sea_orm::ConnectionTrait as _;
use shared_contracts::PaymentOutcome;
use stack::testing::{TestBroker, eventually};

use crate::harness::{Orders, SOON, settlement};

#[tokio::test]
async fn an_order_without_an_answer_is_re_asked_under_new_numbers() {
    let orders = Orders::start_with_arguments(&["--ask-again-ms=200"]).await;
    let id = orders.placed().await;
    let published = "SELECT count(*) FROM outbox WHERE n = 5 AND published_at IS NOT NULL";
    orders
        .until("the fifth re-ask is published", published, 1)
        .await;

    let row = orders.row(id).await;
    assert!(row.asks >= 5 && row.asked_at.is_some());
    let requests = format!(
        "SELECT count(*) FROM outbox WHERE event_id = '{}' AND n <= 5",
        row.placed_event_id
    );
    assert_eq!(
        orders.count(&requests).await,
        6,
        "one event, published six times"
    );
    let stored = format!(
        "SELECT count(DISTINCT stream_sequence) FROM outbox WHERE event_id = '{}' AND n <= 5",
        row.placed_event_id
    );
    assert_eq!(
        orders.count(&stored).await,
        6,
        "the broker dropped none as a duplicate"
    );
    let numbered = "SELECT count(*) FROM outbox WHERE n > 0 AND headers::jsonb ->> 'Gozon-Ask' = n::text AND n <= 5";
    assert_eq!(orders.count(numbered).await, 5);
    let waits =
        "SELECT count(*) FROM outbox later JOIN outbox earlier ON later.event_id = earlier.event_id AND later.n = earlier.n + 1
                 WHERE later.created_at < earlier.published_at + make_interval(secs => 0.2 * power(2, earlier.n))";
    assert_eq!(
        orders.count(waits).await,
        0,
        "each interval is twice as long as the one before"
    );

    orders
        .payments()
        .await
        .publish(&settlement(id, PaymentOutcome::Paid))
        .await;
    orders.until_status(id, "FINISHED").await;
}

#[tokio::test]
async fn a_final_order_is_not_re_asked() {
    let orders = Orders::start_with_arguments(&["--ask-again-ms=200"]).await;
    let (done, open) = (orders.placed().await, orders.placed().await);
    orders
        .payments()
        .await
        .publish(&settlement(done, PaymentOutcome::Paid))
        .await;
    orders.until_status(done, "FINISHED").await;
    let asks = orders.row(done).await.asks;
    eventually("the other order is re-asked twice", SOON, async || {
        (orders.row(open).await.asks >= asks + 2).then_some(())
    })
    .await;
    assert_eq!(orders.row(done).await.asks, asks);
}

#[tokio::test]
async fn an_order_is_not_re_asked_while_its_request_waits_for_the_broker() {
    let mut orders =
        Orders::start_with(TestBroker::stopped().unwrap(), &["--ask-again-ms=200"]).await;
    let id = orders.placed().await;
    let waits = "SELECT count(*) FROM outbox WHERE published_at IS NULL AND created_at < now() - interval '3 seconds'";
    orders
        .until("the request has waited for 3 s", waits, 1)
        .await;
    assert_eq!(
        orders.row(id).await.asks,
        0,
        "no re-ask before the first request is published"
    );

    orders.broker.up().await.unwrap();
    eventually("it is re-asked after it was published", SOON, async || {
        (orders.row(id).await.asks > 0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn when_the_broker_comes_back_empty_every_new_order_is_due_at_once() {
    // The default of 30 s applies, and the test does not wait that long.
    let mut orders = Orders::start().await;
    for _ in 0..5 {
        orders.placed().await;
    }
    orders
        .until(
            "all are published",
            "SELECT count(*) FROM outbox WHERE n = 0 AND published_at IS NOT NULL",
            5,
        )
        .await;
    orders.broker.kill().await.unwrap();
    orders.broker.wipe().unwrap();
    let wiped_at = orders
        .count("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint")
        .await;
    orders.broker.up().await.unwrap();
    let published = format!(
        "SELECT count(DISTINCT o.id) FROM orders o JOIN outbox b ON b.event_id = o.placed_event_id
         WHERE b.n > 0 AND extract(epoch FROM b.published_at) * 1000000 > {wiped_at}"
    );
    orders.until("all are re-asked", &published, 5).await;
}

#[tokio::test]
async fn events_published_before_all_streams_existed_do_not_count_as_lost() {
    // The default of 30 s applies. Without the stream of payments, orders cannot create its
    // consumer yet.
    let orders = Orders::start_with(TestBroker::start().await.unwrap(), &[]).await;
    let early = orders.placed().await;
    orders
        .until(
            "its request is published",
            "SELECT count(*) FROM outbox WHERE published_at IS NOT NULL",
            1,
        )
        .await;
    orders.payments().await;
    eventually("the consumer is ready", SOON, async || {
        let health = orders.http.get("/readyz?verbose").await.ok()?.text();
        health.contains("[+] consumer: ok").then_some(())
    })
    .await;
    // A new consumer notes a loss before it reports that it is ready. The step that re-asks the
    // second of these orders began after that.
    for _ in 0..2 {
        let forgotten = orders.forgotten(early, "now() - interval '1 hour'").await;
        eventually("a forgotten order is re-asked", SOON, async || {
            (orders.row(forgotten).await.asks > 0).then_some(())
        })
        .await;
    }
    assert_eq!(orders.row(early).await.asks, 0);
}

#[tokio::test]
async fn f43_an_order_dated_by_a_clock_far_ahead_is_re_asked_and_its_age_is_shown() {
    let orders = Orders::start().await;
    let id = orders.placed().await;
    let ahead = orders.forgotten(id, "now() + interval '30 days'").await;
    eventually("it is re-asked", SOON, async || {
        (orders.row(ahead).await.asks > 0).then_some(())
    })
    .await;
    let metrics = orders.http.get("/metrics").await.unwrap().text();
    let age = metrics
        .lines()
        .find_map(|line| line.strip_prefix("gozon_oldest_new_order_age_seconds "))
        .unwrap();
    assert!(age.parse::<f64>().unwrap() >= 0.0, "{age}");
}

#[tokio::test]
async fn f19_a_request_that_the_broker_never_takes_delays_no_other_request() {
    let orders = Orders::start_with_arguments(&["--ask-again-ms=200"]).await;
    let too_large = "INSERT INTO outbox (event_id, subject, headers, payload, attempts, created_at)
                     VALUES (gen_random_uuid(), 'gozon.orders.placed', '{}', repeat('x', 2000000), 9, now() - interval '1 hour')";
    orders.db.execute_unprepared(too_large).await.unwrap();
    let id = orders.placed().await;
    eventually("another order is re-asked", SOON, async || {
        (orders.row(id).await.asks > 0).then_some(())
    })
    .await;
    assert_eq!(
        orders
            .count("SELECT count(*) FROM outbox WHERE published_at IS NULL AND attempts >= 9")
            .await,
        1
    );
}

#[tokio::test]
async fn two_replicas_re_ask_no_more_often_than_one() {
    let orders = Orders::start_with_arguments(&["--ask-again-ms=200"]).await;
    let second = orders.replica().await;
    for _ in 0..20 {
        orders.placed().await;
    }
    orders
        .until(
            "all are re-asked twice",
            "SELECT count(*) FROM outbox WHERE n = 2",
            20,
        )
        .await;
    let early =
        "SELECT count(*) FROM outbox later JOIN outbox earlier ON later.event_id = earlier.event_id AND later.n = earlier.n + 1
                 WHERE earlier.n > 0 AND later.created_at < earlier.published_at + make_interval(secs => 0.2 * power(2, earlier.n))";
    assert_eq!(orders.count(early).await, 0);
    second.stop().await.unwrap();
}

#[tokio::test]
async fn old_rows_are_pruned_and_an_order_that_is_still_new_is_re_asked() {
    let orders = Orders::start_with_arguments(&["--keep-seconds=1", "--ask-again-ms=200"]).await;
    let (done, open) = (orders.placed().await, orders.placed().await);
    orders
        .payments()
        .await
        .publish(&settlement(done, PaymentOutcome::Paid))
        .await;
    orders.until_status(done, "FINISHED").await;
    orders
        .until("the inbox is pruned", "SELECT count(*) FROM inbox", 0)
        .await;
    let first = format!(
        "SELECT count(*) FROM outbox WHERE event_id = '{}' AND n = 0",
        orders.row(open).await.placed_event_id
    );
    orders.until("the first request is pruned", &first, 0).await;
    let any = format!(
        "SELECT count(*) FROM outbox WHERE event_id = '{}'",
        orders.row(open).await.placed_event_id
    );
    orders
        .until("its last request is pruned too", &any, 0)
        .await;
    let asks = orders.row(open).await.asks;
    eventually("it is re-asked", SOON, async || {
        (orders.row(open).await.asks > asks).then_some(())
    })
    .await;
    assert_eq!(orders.status(done).await, "FINISHED");
}
