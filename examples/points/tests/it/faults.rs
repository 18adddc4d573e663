//! Points are awarded once per order, under combinations of delivery faults.

use std::collections::HashSet;
use std::sync::Mutex;

use messaging::testing::{Published, Scenario, run_under_faults};
use messaging::{Database, Handled, Received, Subscriber, Subscription, Transaction, sql};
use points::{AwardPoints, Migrator};
use sea_orm::ConnectionTrait as _;
use shared_contracts::{Amount, EventId, OrderFinished, OrderId, UserId};
use stack::testing::TestDatabase;

/// Twelve orders of three users.
struct Orders<S>(fn() -> S);

impl<S: Subscriber<Event = OrderFinished>> Scenario for Orders<S> {
    type Subscriber = S;

    async fn prepare(&self, db: &Database) -> anyhow::Result<S> {
        db.migrate::<Migrator>().await?;
        Ok((self.0)())
    }

    fn events(&self) -> Vec<Published<OrderFinished>> {
        let order = |number: usize| OrderFinished {
            order_id: OrderId::mint(),
            user_id: UserId::parse(["alice", "bob", "carol"][number % 3]).unwrap(),
            amount: Amount::new(1).unwrap(),
        };
        (0..12)
            .map(|number| Published::new(order(number)))
            .collect()
    }

    async fn observe(&self, db: &Database) -> anyhow::Result<String> {
        let query =
            "SELECT coalesce(string_agg(user_id || ' ' || points, ', ' ORDER BY user_id), '')
                         AS points FROM points";
        let row = db.query_one_raw(sql(query, [])).await?.unwrap();
        Ok(row.try_get("", "points")?)
    }

    fn commute(&self, _: &OrderFinished, _: &OrderFinished) -> bool {
        true
    }
}

async fn run<S: Subscriber<Event = OrderFinished>>(subscriber: fn() -> S) -> anyhow::Result<()> {
    let databases = tokio::sync::Mutex::new(Vec::new());
    run_under_faults(&Orders(subscriber), 20, async || {
        let database = TestDatabase::fresh().await?;
        let url = database.url.clone().into();
        databases.lock().await.push(database);
        Ok(Database::in_background(&url, "test", 2)?)
    })
    .await
}

#[tokio::test]
async fn every_order_is_awarded_one_point_under_faults() {
    run(|| AwardPoints).await.unwrap();
}

/// A faulty subscriber: it remembers events outside the transaction and skips repeated ones.
#[derive(Default)]
struct RemembersInMemory(Mutex<HashSet<EventId>>);

impl Subscriber for RemembersInMemory {
    type Event = OrderFinished;
    type Effect = i64;

    const SUBSCRIPTION: Subscription = AwardPoints::SUBSCRIPTION;

    async fn handle(
        &self,
        txn: &Transaction,
        batch: &[Received<OrderFinished>],
    ) -> anyhow::Result<Handled<i64>> {
        let is_new = |one: &&Received<OrderFinished>| self.0.lock().unwrap().insert(one.event_id);
        let new: Vec<_> = batch.iter().filter(is_new).cloned().collect();
        AwardPoints.handle(txn, &new).await
    }

    fn committed(&self, awarded: i64) {
        AwardPoints.committed(awarded);
    }

    fn describe(&self, awarded: &i64) -> Option<String> {
        AwardPoints.describe(awarded)
    }
}

#[tokio::test]
async fn a_handler_that_keeps_state_outside_the_transaction_fails_under_faults() {
    let failure = run(RemembersInMemory::default).await.unwrap_err();
    let failure = failure.to_string();
    assert!(failure.contains("a different result"), "{failure}");
}
