//! A process whose clock is wrong by a month. Only PostgreSQL's clock decides.

use std::path::PathBuf;
use std::process::Command;

use sea_orm::{ConnectionTrait as _, DbBackend, Statement};
use stack::testing::eventually;

use crate::shop::{SOON, Shop};

const MONTH: i64 = 30 * 24 * 60 * 60;

/// Builds a library that shifts the clock of a process, with the C compiler that Rust needs anyway.
fn shifted_clock() -> PathBuf {
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/clock_ahead.c");
    let library = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("clock_ahead.so");
    let built = Command::new("cc")
        .args(["-shared", "-fPIC", "-O1", "-o"])
        .arg(&library)
        .arg(source)
        .arg("-ldl")
        .status();
    assert!(built.unwrap().success());
    library
}

async fn a_month_off(service: &str, shift: i64) {
    let mut shop = Shop::start_with(&[("GOZON_ASK_AGAIN_MS", "1000")]).await;
    shop.customer("alice", 1000).await;
    for _ in 0..3 {
        assert_eq!(shop.order("alice", 10).await.0, "FINISHED");
    }
    let db = shop.database(service).await;
    let kept = "SELECT (SELECT count(*) FROM outbox) + (SELECT count(*) FROM inbox)";
    let count = async |sql: &str| -> i64 {
        let statement = Statement::from_string(DbBackend::Postgres, sql);
        let row = db.query_one_raw(statement).await.unwrap().unwrap();
        row.try_get_by_index(0).unwrap()
    };
    let before = count(kept).await;
    let library = shifted_clock();
    let system = &mut shop.stack.system;
    system.stop(service).await.unwrap();
    let environment = [
        ("LD_PRELOAD", library.to_str().unwrap()),
        ("CLOCK_SHIFT_SECONDS", &shift.to_string()),
    ];
    system.spawn_with(service, &environment).unwrap();
    system.until_ready(service).await.unwrap();

    // Orders become final, including one whose hand-off is lost, and none is re-asked too often.
    for _ in 0..3 {
        assert_eq!(shop.order("alice", 10).await.0, "FINISHED");
    }
    let left = "UPDATE outbox SET published_at = NULL, stream_sequence = NULL, attempts = 0
                WHERE event_id = (SELECT event_id FROM outbox ORDER BY created_at DESC LIMIT 1)";
    db.execute_unprepared(left).await.unwrap();
    eventually("it is published again", SOON, async || {
        let waits = "SELECT count(*) FROM outbox WHERE published_at IS NULL";
        (count(waits).await == 0).then_some(())
    })
    .await;
    // Retention has run: it does so at start.
    assert_eq!(count("SELECT count(*) FROM outbox WHERE n > 0").await, 0);
    assert!(count(kept).await > before, "nothing was deleted early");
    let future = "SELECT count(*) FROM retention WHERE outbox_before > clock_timestamp()";
    assert_eq!(count(future).await, 0, "the audit misses nothing");
    shop.assert_settled(6).await;
}

#[tokio::test]
async fn f43_orders_with_a_clock_a_month_ahead_deletes_and_hides_nothing() {
    a_month_off("orders", MONTH).await;
}

#[tokio::test]
async fn f43_payments_with_a_clock_a_month_behind_deletes_and_hides_nothing() {
    a_month_off("payments", -MONTH).await;
}
