//! Connection pools.

use std::time::Duration;

use messaging::Database;
use sea_orm::ConnectionTrait as _;
use stack::proxy::{Protocol, Proxy};
use stack::seed::Seed;
use stack::testing::TestDatabase;

#[tokio::test]
async fn a_caller_that_stops_waiting_for_begin_leaves_no_connection_in_a_transaction() {
    let database = TestDatabase::fresh().await.unwrap();
    let observer = database.connect().await.unwrap();
    let proxy = Proxy::open(Protocol::Plain, database.port(), Seed::new(1));
    let proxy = proxy.await.unwrap();
    let url = database.url_at(proxy.port()).into();
    let db = Database::in_background(&url, "test", 1).await.unwrap();
    db.execute_unprepared("CREATE TABLE noted (id integer)")
        .await
        .unwrap();

    proxy.hold();
    let begin = tokio::time::timeout(Duration::from_millis(200), db.begin("test"));
    assert!(begin.await.is_err(), "the answer to BEGIN is delayed");
    proxy.clear_faults();

    // The pool has only this connection. If it were inside a transaction, the observer would not
    // see the row.
    db.execute_unprepared("INSERT INTO noted VALUES (1)")
        .await
        .unwrap();
    let noted = observer.query_one_raw(messaging::sql("SELECT 1 FROM noted", []));
    assert!(noted.await.unwrap().is_some());
}
