//! Lists of orders.

use messaging::Database;
use orders::entity::order::{Filter, Status, page};
use sea_orm::{ConnectionTrait as _, DbBackend, QueryTrait as _, Statement};
use stack::testing::TestDatabase;

/// Each list must be read from the end of an index, however many orders there are.
#[tokio::test]
async fn no_list_scans_orders_that_it_does_not_show() {
    let database = TestDatabase::fresh().await.unwrap();
    let db = Database::from(database.connect().await.unwrap());
    db.migrate::<orders::Migrator>().await.unwrap();
    db.execute_unprepared(
        "INSERT INTO orders (id, user_id, amount, description, status, reason, idempotency_key, request_hash, placed_event_id, final_event_id, created_at, updated_at)
         SELECT id, 'user-' || n % 1000, 1, '', CASE WHEN n = 7 THEN 'CANCELLED' ELSE 'FINISHED' END, CASE WHEN n = 7 THEN 'no_account' END, n::text, '', id, id, now(), now()
         FROM (SELECT n, ('01933f3c-7d5a-7b60-9d6f-' || lpad(to_hex(n), 12, '0'))::uuid AS id FROM generate_series(1, 100000) n) v;
         ANALYZE orders",
    )
    .await
    .unwrap();
    let before = "01933f3c-7d5a-7b60-9d6f-000000010000".parse().ok();
    for status in [
        None,
        Some(Status::New),
        Some(Status::Finished),
        Some(Status::Cancelled),
    ] {
        for user_id in [None, Some("user-7".to_owned())] {
            let filter = Filter {
                user_id,
                status,
                before,
            };
            let query = page(filter.clone(), 21)
                .build(DbBackend::Postgres)
                .to_string();
            let explain = format!("EXPLAIN (ANALYZE, TIMING off, SUMMARY off) {query}");
            let rows = db
                .query_all_raw(Statement::from_string(DbBackend::Postgres, explain))
                .await
                .unwrap();
            let plan: Vec<String> = rows
                .iter()
                .map(|row| row.try_get_by_index(0).unwrap())
                .collect();
            let scanned = plan.iter().find_map(|line| {
                line.split_once("Rows Removed by Filter: ")?
                    .1
                    .parse::<u64>()
                    .ok()
            });
            assert!(scanned.unwrap_or(0) < 100, "{filter:?}: {plan:#?}");
        }
    }
}
