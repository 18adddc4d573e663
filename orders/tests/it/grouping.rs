//! Orders that are placed at the same time.

use futures_util::FutureExt as _;
use futures_util::future::join_all;
use messaging::Database;
use orders::Error;
use orders::entity::order;
use orders::place::{NewOrder, intake};
use sea_orm::{ConnectionTrait as _, DbBackend, Statement};
use service_kit::idempotency::Execution;
use shared_contracts::{Amount, EventId, OrderId, UserId};
use stack::testing::TestDatabase;
use tokio_util::sync::CancellationToken;

async fn database(database: &TestDatabase, connections: u32) -> Database {
    let url = database.url.clone().into();
    let db = Database::for_requests(&url, "test", connections).unwrap();
    db.migrate::<orders::Migrator>().await.unwrap();
    db
}

fn new_order() -> NewOrder {
    NewOrder {
        id: OrderId::mint(),
        placed_event_id: EventId::mint(),
        user_id: UserId::parse("alice").unwrap(),
        amount: Amount::new(1).unwrap(),
        description: String::new(),
        idempotency_key: OrderId::mint().to_string(),
        created_at: messaging::now(),
        traceparent: None,
    }
}

#[tokio::test]
async fn queued_orders_share_a_transaction_and_each_gets_its_own_answer() {
    let fresh = TestDatabase::fresh().await.unwrap();
    let db = database(&fresh, 3).await;
    let (intake, batcher) = intake();
    let first = NewOrder {
        idempotency_key: "twin".to_owned(),
        ..new_order()
    };
    let twin = NewOrder {
        id: OrderId::mint(),
        placed_event_id: EventId::mint(),
        ..first.clone()
    };
    let other_content = NewOrder {
        amount: Amount::new(2).unwrap(),
        ..twin.clone()
    };
    let mut all: Vec<NewOrder> = (0..30).map(|_| new_order()).collect();
    all.extend([
        first.clone(),
        twin.clone(),
        NewOrder {
            id: OrderId::mint(),
            ..twin
        },
        other_content,
    ]);

    let mut waiting: Vec<_> = all
        .iter()
        .map(|new| Box::pin(intake.place(new.clone())))
        .collect();
    assert!(
        waiting
            .iter_mut()
            .all(|request| request.now_or_never().is_none()),
        "all are queued before the batcher starts"
    );
    let shutdown = CancellationToken::new();
    let answers = tokio::select! {
        answers = join_all(waiting) => answers,
        ended = batcher.run(&db, shutdown) => panic!("{ended:?}"),
    };
    for (new, answer) in all.iter().zip(&answers).take(31) {
        let placed = answer.as_ref().unwrap();
        assert_eq!(
            (placed.order.id, placed.execution),
            (new.id.as_uuid(), Execution::First)
        );
    }
    for twin in &answers[31..33] {
        let placed = twin.as_ref().unwrap();
        assert_eq!(
            (placed.order.id, placed.execution),
            (first.id.as_uuid(), Execution::Replayed)
        );
    }
    assert!(matches!(answers[33], Err(Error::KeyReused)));
    let query = "SELECT count(*) || ' in ' || count(DISTINCT created_at) FROM outbox";
    let row = db
        .query_one_raw(Statement::from_string(DbBackend::Postgres, query))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(row.try_get_by_index::<String>(0).unwrap(), "31 in 1");
}

#[tokio::test]
async fn a_key_that_another_transaction_is_storing_delays_only_its_own_order() {
    let fresh = TestDatabase::fresh().await.unwrap();
    let db = database(&fresh, 3).await;
    let held = new_order();
    let holder = db.begin("test").await.unwrap();
    let insert = order::insert_new(vec![(&held).into()]);
    holder.change_and_enqueue(insert, Vec::new()).await.unwrap();

    let (intake, batcher) = intake();
    let all = [
        new_order(),
        NewOrder {
            id: OrderId::mint(),
            placed_event_id: EventId::mint(),
            ..held.clone()
        },
        new_order(),
    ];
    let answers = join_all(all.iter().map(|new| intake.place(new.clone())));
    let answers = tokio::select! {
        answers = answers => answers,
        ended = batcher.run(&db, CancellationToken::new()) => panic!("{ended:?}"),
    };
    assert!(answers[0].is_ok() && answers[2].is_ok(), "{answers:?}");
    assert!(
        matches!(&answers[1], Err(Error::Database(failure)) if failure.is_lock_timeout()),
        "{answers:?}"
    );
    holder.rollback().await.unwrap();
}

#[tokio::test]
async fn fifty_keys_that_others_are_storing_cost_one_lock_wait() {
    let fresh = TestDatabase::fresh().await.unwrap();
    let db = database(&fresh, 3).await;
    let held: Vec<NewOrder> = (0..50).map(|_| new_order()).collect();
    let holder = db.begin("test").await.unwrap();
    let rows = held.iter().map(Into::into).collect();
    let insert = order::insert_new(rows);
    holder.change_and_enqueue(insert, Vec::new()).await.unwrap();

    let (intake, batcher) = intake();
    let retried = held.into_iter().map(|held| NewOrder {
        id: OrderId::mint(),
        placed_event_id: EventId::mint(),
        ..held
    });
    let all: Vec<NewOrder> = retried.chain((0..10).map(|_| new_order())).collect();
    let begun = std::time::Instant::now();
    let answers = join_all(all.iter().map(|new| intake.place(new.clone())));
    let answers = tokio::select! {
        answers = answers => answers,
        ended = batcher.run(&db, CancellationToken::new()) => panic!("{ended:?}"),
    };
    assert!(answers[..50].iter().all(Result::is_err), "{answers:?}");
    assert!(answers[50..].iter().all(Result::is_ok), "{answers:?}");
    // One wait is a second. Fifty waits would be 50.
    let took = begun.elapsed();
    assert!(took < std::time::Duration::from_secs(4), "{took:?}");
    holder.rollback().await.unwrap();
}

#[tokio::test]
async fn an_order_whose_client_disconnected_while_it_was_queued_is_not_stored() {
    let fresh = TestDatabase::fresh().await.unwrap();
    let db = database(&fresh, 2).await;
    let (intake, batcher) = intake();
    let mut gone = Box::pin(intake.place(new_order()));
    assert!(gone.as_mut().now_or_never().is_none(), "it is queued");
    drop(gone);
    let placed = tokio::select! {
        placed = intake.place(new_order()) => placed.unwrap(),
        ended = batcher.run(&db, CancellationToken::new()) => panic!("{ended:?}"),
    };
    let row = db
        .query_one_raw(Statement::from_string(
            DbBackend::Postgres,
            "SELECT id FROM orders",
        ))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        row.try_get_by_index::<uuid::Uuid>(0).unwrap(),
        placed.order.id,
        "only this order is stored"
    );
}
