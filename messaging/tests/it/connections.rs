//! The connection pool. A statement or a transaction that is cut off must not affect the next user
//! of the pool.

use std::time::Duration;

use messaging::{Database, sql};
use sea_orm::{ConnectionTrait as _, DatabaseConnection, DbErr, TryGetable};
use stack::testing::{TestDatabase, eventually};
use std::future::poll_fn;
use std::task::Poll;

use crate::harness::SOON;

struct Pool {
    db: Database,
    /// A connection outside the pool.
    superuser: DatabaseConnection,
    _database: TestDatabase,
}

async fn pool(connections: u32) -> Pool {
    let database = TestDatabase::fresh().await.unwrap();
    let url = database.url.clone().into();
    let db = Database::in_background(&url, "test", connections).unwrap();
    db.execute_unprepared("CREATE TABLE numbers (number integer)")
        .await
        .unwrap();
    Pool {
        db,
        superuser: database.connect().await.unwrap(),
        _database: database,
    }
}

async fn value<T: TryGetable>(db: &impl sea_orm::ConnectionTrait, query: &str) -> Result<T, DbErr> {
    let row = db.query_one_raw(sql(query, [])).await?.unwrap();
    row.try_get_by_index(0)
}

async fn process(db: &impl sea_orm::ConnectionTrait) -> i32 {
    value(db, "SELECT pg_backend_pid()").await.unwrap()
}

async fn add(db: &impl sea_orm::ConnectionTrait) {
    db.execute_raw(sql("INSERT INTO numbers VALUES (1)", []))
        .await
        .unwrap();
}

impl Pool {
    async fn numbers(&self) -> i64 {
        value(&self.superuser, "SELECT count(*) FROM numbers")
            .await
            .unwrap()
    }

    async fn server_processes(&self) -> i64 {
        let query = "SELECT count(*) FROM pg_stat_activity
                     WHERE datname = current_database() AND pid <> pg_backend_pid()";
        value(&self.superuser, query).await.unwrap()
    }
}

#[tokio::test]
async fn a_cut_off_begin_leaves_no_open_transaction_behind() {
    let pool = pool(1).await;
    let mut cut_off = 0;
    for round in 1..=50 {
        // The connection is idle, so the first poll sends BEGIN.
        let mut begin = Box::pin(pool.db.begin("test"));
        let poll = poll_fn(|context| Poll::Ready(begin.as_mut().poll(context).is_pending()));
        cut_off += u32::from(poll.await);
        drop(begin);
        add(&pool.db).await;
        assert_eq!(pool.numbers().await, round, "the insert is committed");
    }
    assert!(cut_off > 0, "the server always answered at once");
}

#[tokio::test]
async fn a_statement_that_is_cut_off_at_any_point_leaves_no_answer_to_the_next_one() {
    let pool = pool(1).await;
    for number in 0..200 {
        let query = format!("SELECT {number}::integer FROM pg_sleep(0.0005)");
        let limit = Duration::from_micros(number * 10);
        let _ = tokio::time::timeout(limit, value::<i32>(&pool.db, &query)).await;
        let expected = i32::try_from(number).unwrap() + 1000;
        let query = format!("SELECT {expected}");
        assert_eq!(value::<i32>(&pool.db, &query).await.unwrap(), expected);
    }
}

#[tokio::test]
async fn statements_that_are_cut_off_do_not_add_up_to_more_server_processes() {
    let pool = pool(2).await;
    for _ in 0..8 {
        let sleep = pool.db.execute_unprepared("SELECT pg_sleep(1)");
        tokio::time::timeout(Duration::from_millis(150), sleep)
            .await
            .unwrap_err();
        assert!(pool.server_processes().await <= 2);
    }
}

#[tokio::test]
async fn a_dropped_transaction_is_rolled_back_and_its_connection_is_used_again() {
    let pool = pool(1).await;
    let before = process(&pool.db).await;
    for _ in 0..20 {
        let txn = pool.db.begin("test").await.unwrap();
        add(&txn).await;
        drop(txn);
        assert_eq!(process(&pool.db).await, before);
    }
    assert_eq!(pool.numbers().await, 0);
}

#[tokio::test]
async fn a_failed_statement_does_not_cost_its_connection() {
    let pool = pool(1).await;
    let before = process(&pool.db).await;
    let txn = pool.db.begin("test").await.unwrap();
    assert!(txn.execute(sql("SELECT 1 / 0", [])).await.is_err());
    drop(txn);
    assert!(value::<i32>(&pool.db, "SELECT 1 / 0").await.is_err());
    assert_eq!(process(&pool.db).await, before);
}

#[tokio::test]
async fn connections_whose_server_process_ended_are_replaced() {
    let pool = pool(3).await;
    let (one, two, three) = (
        pool.db.begin("test").await.unwrap(),
        pool.db.begin("test").await.unwrap(),
        pool.db.begin("test").await.unwrap(),
    );
    drop((one, two, three));
    eventually("the connections are idle", SOON, async || {
        let query = "SELECT count(*) FROM pg_stat_activity
                     WHERE datname = current_database() AND pid <> pg_backend_pid()
                       AND state = 'idle'";
        let idle: i64 = value(&pool.superuser, query).await.unwrap();
        (idle == 3).then_some(())
    })
    .await;
    let query = "SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity
                 WHERE datname = current_database() AND pid <> pg_backend_pid()";
    let ended: i64 = value(&pool.superuser, query).await.unwrap();
    assert_eq!(ended, 3);
    // One statement notices; all connections of that time are replaced.
    let mut failed = 0;
    for _ in 0..6 {
        failed += i32::from(value::<i32>(&pool.db, "SELECT 1").await.is_err());
    }
    assert_eq!(failed, 1);
}

#[tokio::test]
async fn connections_to_a_server_that_became_read_only_are_replaced_at_once() {
    let pool = pool(1).await;
    let before = process(&pool.db).await;
    let demoted = "ALTER DATABASE CURRENT SET default_transaction_read_only = on";
    let name: String = value(&pool.superuser, "SELECT current_database()")
        .await
        .unwrap();
    let demoted = demoted.replace("CURRENT", &name);
    pool.superuser.execute_unprepared(&demoted).await.unwrap();
    // An open session keeps its setting, so this one is demoted by hand.
    pool.db
        .execute_unprepared("SET default_transaction_read_only = on")
        .await
        .unwrap();
    let insert = sql("INSERT INTO numbers VALUES (1)", []);
    assert!(pool.db.execute_raw(insert).await.is_err());
    assert_ne!(process(&pool.db).await, before);
}
