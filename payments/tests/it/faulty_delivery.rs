//! Orders are charged once, under combinations of delivery faults.

use std::collections::HashSet;
use std::sync::Mutex;

use messaging::testing::{Published, Scenario, run_under_faults};
use messaging::{Database, Handled, Received, Subscriber, Subscription, Transaction, sql};
use payments::{Charge, Migrator};
use sea_orm::ConnectionTrait as _;
use shared_contracts::{Amount, EventId, OrderId, OrderPlaced, UserId};
use stack::testing::TestDatabase;

const USERS: [&str; 3] = ["alice", "bob", "carol"];
const ORDERS: usize = 12;

/// Twelve orders of three users. Each user starts with `balance`.
struct Orders<S> {
    subscriber: fn() -> S,
    balance: i64,
}

impl<S: Subscriber<Event = OrderPlaced>> Scenario for Orders<S> {
    type Subscriber = S;

    async fn prepare(&self, db: &Database) -> anyhow::Result<S> {
        db.migrate::<Migrator>().await?;
        for user in USERS {
            let account = sql(
                "INSERT INTO accounts (user_id, balance, idempotency_key, created_at)
                 VALUES ($1, $2, $1, now())",
                [user.into(), self.balance.into()],
            );
            db.execute_raw(account).await?;
        }
        Ok((self.subscriber)())
    }

    fn events(&self) -> Vec<Published<OrderPlaced>> {
        let order = |number: usize| OrderPlaced {
            order_id: OrderId::mint(),
            user_id: UserId::parse(USERS[number % USERS.len()]).unwrap(),
            amount: Amount::new(10 + number as i64).unwrap(),
        };
        (0..ORDERS)
            .map(|number| Published::new(order(number)))
            .collect()
    }

    /// With enough money, the outcomes do not depend on the order of delivery. With too little they
    /// do, and only the number of decisions must be equal.
    async fn observe(&self, db: &Database) -> anyhow::Result<String> {
        let query = match self.has_enough_money() {
            true => {
                "SELECT (SELECT string_agg(concat_ws(' ', user_id, amount, outcome, reason), ', '
                                           ORDER BY order_id) FROM payments)
                     || '; ' || (SELECT string_agg(user_id || ' ' || balance, ', ' ORDER BY user_id)
                                 FROM accounts)
                     || '; answers: ' || (SELECT count(*) FROM outbox WHERE n = 0)"
            }
            false => "SELECT count(*)::text FROM payments",
        };
        let row = db.query_one_raw(sql(query, [])).await?.unwrap();
        Ok(row.try_get_by_index(0)?)
    }

    async fn check(&self, db: &Database) -> anyhow::Result<()> {
        let query = "
            SELECT user_id FROM accounts a WHERE balance < 0 OR balance <> $1 - (
                SELECT coalesce(sum(amount), 0) FROM transfers t WHERE t.user_id = a.user_id)
            UNION ALL
            SELECT order_id::text FROM payments p WHERE (outcome = 'paid') <> EXISTS (
                SELECT FROM transfers t WHERE t.order_id = p.order_id AND t.amount = p.amount)";
        let wrong = db.query_all_raw(sql(query, [self.balance.into()])).await?;
        let wrong: Vec<String> = wrong
            .iter()
            .map(|row| row.try_get_by_index(0).unwrap())
            .collect();
        anyhow::ensure!(
            wrong.is_empty(),
            "transfers do not match for these users or orders: {wrong:?}"
        );
        Ok(())
    }

    fn commute(&self, _: &OrderPlaced, _: &OrderPlaced) -> bool {
        true
    }
}

impl<S> Orders<S> {
    fn has_enough_money(&self) -> bool {
        self.balance >= 1000
    }
}

async fn run<S: Subscriber<Event = OrderPlaced>>(
    subscriber: fn() -> S,
    balance: i64,
) -> anyhow::Result<()> {
    let databases = tokio::sync::Mutex::new(Vec::new());
    let orders = Orders {
        subscriber,
        balance,
    };
    run_under_faults(&orders, 15, async || {
        let database = TestDatabase::fresh().await?;
        let url = database.url.clone().into();
        databases.lock().await.push(database);
        Ok(Database::in_background(&url, "test", 2)?)
    })
    .await
}

#[tokio::test]
async fn with_enough_money_every_order_is_paid_once_under_faults() {
    run(|| Charge, 1000).await.unwrap();
}

#[tokio::test]
async fn with_too_little_money_no_order_is_paid_twice_or_on_credit_under_faults() {
    run(|| Charge, 35).await.unwrap();
}

/// A faulty subscriber: it remembers events outside the transaction and skips repeated ones.
#[derive(Default)]
struct RemembersInMemory(Mutex<HashSet<EventId>>);

impl Subscriber for RemembersInMemory {
    type Event = OrderPlaced;
    type Effect = <Charge as Subscriber>::Effect;

    const SUBSCRIPTION: Subscription = Charge::SUBSCRIPTION;

    async fn handle(
        &self,
        txn: &Transaction,
        batch: &[Received<OrderPlaced>],
    ) -> anyhow::Result<Handled<Self::Effect>> {
        let is_new = |one: &&Received<OrderPlaced>| self.0.lock().unwrap().insert(one.event_id);
        let new: Vec<_> = batch.iter().filter(is_new).cloned().collect();
        Charge.handle(txn, &new).await
    }

    fn committed(&self, charged: Self::Effect) {
        Charge.committed(charged);
    }

    fn describe(&self, charged: &Self::Effect) -> Option<String> {
        Charge.describe(charged)
    }
}

#[tokio::test]
async fn a_handler_that_keeps_state_outside_the_transaction_fails_under_faults() {
    let failure = run(RemembersInMemory::default, 1000).await.unwrap_err();
    let failure = failure.to_string();
    assert!(failure.contains("a different result"), "{failure}");
}
