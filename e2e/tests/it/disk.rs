//! A full or failing disk: nothing is accepted without being stored, and everything continues when
//! there is space again.

use std::fs::File;
use std::io::Write as _;
use std::process::Stdio;
use std::time::Duration;

use sea_orm::ConnectionTrait as _;
use serde_json::json;
use stack::testing::{SmallDisk, TestStack, eventually};

use crate::faults::{CLIENTS, ORDERS_EACH, place_orders_while, with_customers};
use crate::shop::{SOON, Shop};

/// A test that cannot run on this machine passes, and `recipes/test.sh` reports it at the end.
fn not_tested(why: &str) {
    let mut list = File::options()
        .create(true)
        .append(true)
        .open(concat!(env!("CARGO_TARGET_TMPDIR"), "/not-tested"))
        .unwrap();
    writeln!(list, "{why}").unwrap();
}

/// A shop with the data of one part on a small disk. Needs root; otherwise the test reports that it
/// did not run.
async fn shop_on_a_small_disk(part: &str, megabytes: u32) -> Option<(Shop, SmallDisk)> {
    let mut stack = TestStack::prepare(Vec::new()).await.unwrap();
    let disk = match SmallDisk::mount(megabytes) {
        Ok(disk) => disk,
        Err(error) => {
            not_tested(&format!("a full disk of {part}: {error:#}"));
            return None;
        }
    };
    let folder = stack.system.folder();
    disk.move_folder(&if part == "postgres" {
        folder.postgres_data()
    } else {
        folder.nats_data()
    })
    .unwrap();
    stack.system.start_all(|_, _| {}).await.unwrap();
    Some((with_customers(Shop::with_stack(stack)).await, disk))
}

#[tokio::test]
async fn f12_nothing_is_lost_when_the_disk_of_the_database_is_full() {
    let Some((mut shop, disk)) = shop_on_a_small_disk("postgres", 400).await else {
        return;
    };
    place_orders_while(&mut shop, async |shop| {
        disk.fill().unwrap();
        let refused = eventually("an order is refused", SOON, async || {
            let order =
                json!({ "user_id": "user-0", "amount": 1_000_000, "description": "x".repeat(500) });
            let answer = shop.http.post("/v1/orders", None, &order).await.ok()?;
            (answer.status != 201).then_some(answer)
        })
        .await;
        assert_eq!(
            (refused.status, refused.header("content-type")),
            (503, Some("application/problem+json"))
        );
        disk.free().unwrap();
        // PostgreSQL may have exited, so restart it, as its supervisor would.
        if shop.stack.system.ended("postgres").is_some() {
            eventually("it is running again", SOON, async || {
                shop.stack.system.start("postgres").await.ok()
            })
            .await;
        }
    })
    .await;
    // Others may have been accepted too; there is no money for them.
    let placed = shop.placed().await;
    assert!(placed >= CLIENTS * ORDERS_EACH, "{placed}");
    assert_eq!(shop.assert_settled(placed).await, 100);
}

#[tokio::test]
async fn f26_nothing_is_lost_when_the_disk_of_the_broker_is_full() {
    let Some((mut shop, disk)) = shop_on_a_small_disk("nats", 64).await else {
        return;
    };
    place_orders_while(&mut shop, async |shop| {
        disk.fill().unwrap();
        let orders = shop.database("orders").await;
        eventually("an event cannot be published", SOON, async || {
            shop.broker_rejected_a_message(&orders).await.then_some(())
        })
        .await;
        disk.free().unwrap();
        // The server disables its streams until it is restarted, as its supervisor would.
        shop.stack.system.stop("nats").await.unwrap();
        shop.stack.system.start("nats").await.unwrap();
    })
    .await;
    assert_eq!(shop.assert_settled(CLIENTS * ORDERS_EACH).await, 100);
}

/// fsync fails (F13): PostgreSQL does not continue as if nothing had happened, and neither do the
/// services.
#[tokio::test]
async fn f13_nothing_is_lost_when_fsync_of_the_database_fails() {
    let mut shop = with_customers(Shop::start().await).await;
    let postgres = shop.stack.system.pid("postgres").unwrap();
    // fsync fails in new sessions of the server, which flush the WAL when they commit.
    let failing = [
        "-f",
        "-qq",
        "-e",
        "trace=fdatasync,fsync",
        "-e",
        "inject=fdatasync,fsync:error=EIO:when=3+",
        "-p",
    ];
    let log = shop.stack.system.folder().log("postgres");
    place_orders_while(&mut shop, async |shop| {
        let strace = tokio::process::Command::new("strace")
            .args(failing)
            .arg(postgres.to_string())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn();
        let Ok(mut strace) = strace else {
            not_tested("F13: there is no strace");
            return;
        };
        let failed = eventually("fsync fails", SOON, async || {
            // Without permission to trace other processes, strace ends at once.
            if strace.try_wait().ok().flatten().is_some() {
                return Some(false);
            }
            // Give new sessions time to commit. The customers may be finished, so write more WAL.
            let ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                         WHERE datname IN ('orders', 'payments') AND backend_start < clock_timestamp() - interval '1 second'";
            let write = async {
                let server = shop.stack.system.postgres().connect("postgres").await?;
                for statement in [ended, "CREATE TABLE noise ()", "DROP TABLE noise", "CREATE TABLE noise ()", "DROP TABLE noise"]
                {
                    server.execute_unprepared(statement).await?;
                }
                anyhow::Ok(())
            };
            // This query may fail too.
            let _ = tokio::time::timeout(Duration::from_secs(1), write).await;
            std::fs::read_to_string(&log).is_ok_and(|log| log.contains("PANIC")).then_some(true)
        })
        .await;
        if !failed {
            not_tested("F13: strace may not watch PostgreSQL");
        }
        // On SIGTERM, strace detaches.
        if let Some(pid) = strace.id().and_then(|id| rustix::process::Pid::from_raw(i32::try_from(id).ok()?)) {
            rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        }
        strace.wait().await.unwrap();
        // PostgreSQL restarts by itself, or exits now or soon; then restart it, as its supervisor
        // would.
        eventually("it is running again", SOON, async || {
            if shop.stack.system.ended("postgres").is_some() {
                shop.stack.system.start("postgres").await.ok()?;
            }
            let server = shop.stack.system.postgres().connect("postgres").await.ok()?;
            server.execute_unprepared("CREATE TABLE written ()").await.ok()
        })
        .await;
    })
    .await;
    assert_eq!(shop.assert_settled(CLIENTS * ORDERS_EACH).await, 100);
}
