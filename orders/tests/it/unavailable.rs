//! What works without the broker or the database, and how failures are reported.

use futures_util::future::join_all;
use sea_orm::ConnectionTrait as _;
use serde_json::json;
use shared_contracts::PaymentOutcome;
use stack::http::Http;
use stack::testing::{TestBroker, eventually};

use crate::harness::{Orders, SOON, id, settlement};

#[tokio::test]
async fn orders_are_accepted_while_the_broker_is_away_and_published_when_it_returns() {
    let mut orders = Orders::start_with(TestBroker::stopped().unwrap(), &[]).await;
    let placed = orders.place(Some("k"), "alice", 10).await;
    assert_eq!(placed.status, 201, "{}", placed.text());
    let health = orders.http.get("/readyz?verbose").await.unwrap();
    assert_eq!(health.status, 200, "ready without a broker");
    assert!(
        health
            .text()
            .contains("[~] relay: degraded, the broker is away"),
        "{}",
        health.text()
    );

    orders.broker.up().await.unwrap();
    orders
        .until(
            "it is published",
            "SELECT count(*) FROM outbox WHERE n = 0 AND published_at IS NOT NULL",
            1,
        )
        .await;
    orders
        .payments()
        .await
        .publish(&settlement(id(&placed.json()), PaymentOutcome::Paid))
        .await;
    orders.until_status(id(&placed.json()), "FINISHED").await;

    // The broker fails again, now while the service is connected.
    orders.broker.kill().await.unwrap();
    let during: Vec<_> = futures_util::future::join_all((0..20).map(|_| orders.placed())).await;
    eventually("the consumer is reported as degraded", SOON, async || {
        let health = orders.http.get("/readyz?verbose").await.unwrap().text();
        health
            .contains("[~] consumer: degraded, the broker is away")
            .then_some(())
    })
    .await;
    orders.broker.up().await.unwrap();
    orders
        .until(
            "all are published",
            "SELECT count(*) FROM outbox WHERE published_at IS NULL",
            0,
        )
        .await;
    let payments = orders.payments().await;
    for id in &during {
        payments
            .publish(&settlement(*id, PaymentOutcome::Paid))
            .await;
    }
    for id in during {
        orders.until_status(id, "FINISHED").await;
    }
}

#[tokio::test]
async fn without_its_database_a_service_is_not_ready_and_recovers_by_itself() {
    let orders = Orders::start().await;
    let name = orders
        .count("SELECT substr(current_database(), 6)::bigint")
        .await;
    let superuser = orders.database.connect_elsewhere().await.unwrap();
    let execute = async |sql: String| {
        sea_orm::ConnectionTrait::execute_unprepared(&superuser, &sql)
            .await
            .unwrap()
    };
    execute(format!(
        "ALTER DATABASE test_{name} ALLOW_CONNECTIONS false"
    ))
    .await;
    execute(format!(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'test_{name}'"
    ))
    .await;

    let second = orders.replica_unready().await;
    for http in [
        orders.http.clone(),
        Http::new(format!("http://{}", second.address)),
    ] {
        assert_eq!(http.get("/livez").await.unwrap().status, 200);
        let ready = http.get("/readyz").await.unwrap();
        assert_eq!(
            (ready.status, &ready.json()["code"]),
            (503, &json!("not_ready"))
        );
        let placed = http
            .post(
                "/v1/orders",
                Some("k"),
                &json!({ "user_id": "alice", "amount": 10 }),
            )
            .await
            .unwrap();
        assert_eq!(
            (placed.status, placed.header("retry-after")),
            (503, Some("1")),
            "{}",
            placed.text()
        );
        let detail = placed.json()["detail"].to_string();
        assert!(
            detail.contains("Orders Service temporarily unavailable. Wait"),
            "{detail}"
        );
        assert_eq!(
            placed.header("content-type"),
            Some("application/problem+json")
        );
    }

    execute(format!("ALTER DATABASE test_{name} ALLOW_CONNECTIONS true")).await;
    for http in [
        orders.http.clone(),
        Http::new(format!("http://{}", second.address)),
    ] {
        eventually("ready again", SOON, async || {
            (http.get("/readyz").await.unwrap().status == 200).then_some(())
        })
        .await;
        let placed = http
            .post(
                "/v1/orders",
                Some("k"),
                &json!({ "user_id": "alice", "amount": 10 }),
            )
            .await
            .unwrap();
        assert_eq!(placed.status, 201, "{}", placed.text());
    }
    second.stop().await.unwrap();
}

#[tokio::test]
async fn a_shutdown_is_quick_although_a_request_waits() {
    let mut orders = Orders::start().await;
    let id = orders.placed().await;
    let begun = std::time::Instant::now();
    let waiting = orders.http.clone();
    let path = format!("/v1/orders/{id}?wait=30");
    let waiting = tokio::spawn(async move { waiting.get(&path).await });
    orders.stop().await;
    assert!(
        begun.elapsed() < std::time::Duration::from_secs(10),
        "stopped after {:?}",
        begun.elapsed()
    );
    waiting.abort();
    orders.run().await;
    assert_eq!(orders.status(id).await, "NEW");
}

#[tokio::test]
async fn columns_added_by_a_newer_version_do_not_break_a_running_replica() {
    let orders = Orders::start_with_arguments(&["--ask-again-ms=200"]).await;
    let first = orders.place(Some("k"), "alice", 10).await;
    let again = async || {
        let answer = orders.place(Some("k"), "alice", 10).await;
        assert_eq!(
            (answer.status, answer.header("idempotency-replayed")),
            (201, Some("true")),
            "{}",
            answer.text()
        );
    };
    let asked = async |times: i32| {
        eventually("it is re-asked", SOON, async || {
            (orders.row(id(&first.json())).await.asks >= times).then_some(())
        })
        .await;
    };
    // Repeated, because each connection prepares its statements separately.
    for _ in 0..10 {
        again().await;
    }
    asked(1).await;
    for table in [
        "orders",
        "outbox",
        "inbox",
        "dead_letters",
        "reconciliation",
        "retention",
    ] {
        orders
            .db
            .execute_unprepared(&format!("ALTER TABLE {table} ADD COLUMN later integer"))
            .await
            .unwrap();
    }
    for _ in 0..10 {
        again().await;
    }
    asked(3).await;
    orders
        .payments()
        .await
        .publish(&settlement(id(&first.json()), PaymentOutcome::Paid))
        .await;
    orders.until_status(id(&first.json()), "FINISHED").await;
}

#[tokio::test]
async fn slow_lists_keep_no_order_from_being_placed() {
    let mut orders = Orders::start_with_arguments(&["--http-connections=2"]).await;
    // Only reads are slow.
    orders
        .db
        .execute_unprepared(
            "CREATE FUNCTION slow() RETURNS boolean LANGUAGE plpgsql AS $$
             BEGIN
                 IF current_setting('application_name') = 'orders http' THEN
                     PERFORM pg_sleep(3);
                 END IF;
                 RETURN true;
             END $$;
             GRANT EXECUTE ON FUNCTION slow() TO PUBLIC;
             ALTER TABLE orders ENABLE ROW LEVEL SECURITY;
             ALTER TABLE orders FORCE ROW LEVEL SECURITY;
             CREATE POLICY slow ON orders USING (slow()) WITH CHECK (true);",
        )
        .await
        .unwrap();
    orders.placed().await;
    let lists = join_all((0..8).map(|_| orders.http.get("/v1/orders")));
    let placing = async {
        for _ in 0..20 {
            orders.placed().await;
        }
    };
    tokio::select! {
        () = placing => {}
        _ = lists => panic!("the lists were answered first"),
    }
    orders.stop().await;
}

#[tokio::test]
async fn a_read_only_database_is_not_ready_and_its_connections_are_dropped() {
    let mut orders = Orders::start().await;
    let readiness = async || orders.http.get("/readyz").await.unwrap().status;
    orders.placed().await;
    let database = orders.database.name();
    let set =
        |value| format!("ALTER DATABASE {database} SET default_transaction_read_only = {value}");
    orders.db.execute_unprepared(&set("on")).await.unwrap();
    let terminate = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                     WHERE datname = current_database() AND pid <> pg_backend_pid()";
    orders.db.execute_unprepared(terminate).await.unwrap();
    eventually("it is not ready", SOON, async || {
        (readiness().await == 503).then_some(())
    })
    .await;
    let refused = orders.place(None, "alice", 10).await;
    assert_eq!(refused.status, 503, "{}", refused.text());

    // As after a failover: old connections still lead to a server that lets nobody write.
    let admin = orders.database.connect_elsewhere().await.unwrap();
    admin.execute_unprepared(&set("off")).await.unwrap();
    eventually("it is ready again", SOON, async || {
        (readiness().await == 200).then_some(())
    })
    .await;
    orders.placed().await;
    orders.stop().await;
}

#[tokio::test]
async fn a_database_without_fsync_is_refused_unless_it_is_accepted() {
    let mut orders = Orders::start().await;
    let health = orders.http.get("/readyz?verbose").await.unwrap();
    assert_eq!(health.status, 200);
    assert!(
        health
            .text()
            .contains("[~] durability: degraded, PostgreSQL may lose"),
        "{}",
        health.text()
    );
    let strict = orders.strict_replica().await;
    let http = Http::new(format!("http://{}", strict.address));
    eventually("it says why it is not ready", SOON, async || {
        let health = http.get("/readyz?verbose").await.ok()?;
        (health.status == 503 && health.text().contains("enable fsync")).then_some(())
    })
    .await;
    strict.stop().await.unwrap();
    orders.stop().await;
}
