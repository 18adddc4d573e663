//! The example with a running system.

use std::time::Duration;

use clap::Parser as _;
use sea_orm::{ConnectionTrait as _, DbBackend, Statement};
use serde_json::json;
use stack::http::Http;
use stack::testing::{TestDatabase, TestStack, eventually};
use tokio_util::sync::CancellationToken;

const SOON: Duration = Duration::from_secs(60);

/// The service runs as the NATS user `reader`, which may only create durable consumers.
#[tokio::test]
async fn orders_placed_before_the_service_started_are_awarded() {
    let stack = TestStack::start().await.unwrap();
    let http = Http::new(stack.system.address("gateway"));
    let post = async |path: &str, body| {
        let answer = http.post(path, None, &body).await.unwrap();
        assert_eq!(answer.status, 201, "{}", answer.text());
    };
    post("/v1/accounts", json!({ "user_id": "alice" })).await;
    post("/v1/accounts/alice/deposits", json!({ "amount": 20 })).await;
    for _ in 0..2 {
        post("/v1/orders", json!({ "user_id": "alice", "amount": 10 })).await;
    }
    // No money is left: this order is cancelled and awards nothing.
    post("/v1/orders", json!({ "user_id": "alice", "amount": 10 })).await;

    let database = TestDatabase::fresh().await.unwrap();
    let db = database.connect().await.unwrap();
    let config = points::Config::parse_from([
        "points",
        &format!("--database-url={}", database.url),
        &format!("--nats-url={}", stack.system.nats().url()),
        "--nats-user=reader",
        // The shared server of the tests runs without fsync.
        "--accept-unsafe-database",
        &format!(
            "--nats-password={}",
            stack.system.folder().secrets.nats_reader
        ),
    ]);
    let shutdown = CancellationToken::new();
    let service = tokio::spawn({
        let shutdown = shutdown.clone();
        async move { points::run(&config, shutdown).await }
    });
    eventually("two points", SOON, async || {
        let query = "SELECT points FROM points WHERE user_id = 'alice'";
        let statement = Statement::from_string(DbBackend::Postgres, query);
        let row = db.query_one_raw(statement).await.ok()??;
        (row.try_get_by_index::<i64>(0).ok()? == 2).then_some(())
    })
    .await;
    shutdown.cancel();
    service.await.unwrap().unwrap();
}
