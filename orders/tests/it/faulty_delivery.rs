//! Orders end once, as payments decided, under combinations of delivery faults.

use messaging::testing::{Published, Scenario, run_under_faults};
use messaging::{Database, Handled, Received, Subscriber, Subscription, Transaction, now, sql};
use orders::entity::order;
use orders::place::NewOrder;
use orders::{Migrator, Settle};
use sea_orm::ConnectionTrait as _;
use shared_contracts::{
    Amount, DeclineReason, EventId, OrderId, PaymentOutcome, PaymentSettled, UserId,
};
use stack::testing::TestDatabase;

const ORDERS: usize = 12;

/// Answers about twelve orders; every third was declined.
struct Answers<S> {
    subscriber: fn() -> S,
    orders: Vec<NewOrder>,
}

impl<S: Subscriber<Event = PaymentSettled>> Scenario for Answers<S> {
    type Subscriber = S;

    async fn prepare(&self, db: &Database) -> anyhow::Result<S> {
        db.migrate::<Migrator>().await?;
        let txn = db.begin("test").await?;
        let orders = self.orders.iter().map(order::Model::from).collect();
        txn.change_and_enqueue(order::insert_new(orders), Vec::new())
            .await?;
        txn.commit().await?;
        Ok((self.subscriber)())
    }

    fn events(&self) -> Vec<Published<PaymentSettled>> {
        let outcome = |number: usize| match number % 3 {
            0 => PaymentOutcome::Declined {
                reason: DeclineReason::InsufficientFunds,
            },
            _ => PaymentOutcome::Paid,
        };
        let answer = |(number, order): (usize, &NewOrder)| {
            Published::new(PaymentSettled {
                order_id: order.id,
                user_id: order.user_id.clone(),
                amount: order.amount,
                outcome: outcome(number),
            })
        };
        self.orders.iter().enumerate().map(answer).collect()
    }

    async fn observe(&self, db: &Database) -> anyhow::Result<String> {
        let query = "
            SELECT (SELECT string_agg(concat_ws(' ', status, reason), ', ' ORDER BY id) FROM orders)
                || '; ' || (SELECT string_agg(subject || ' ' || payload, ', ' ORDER BY payload)
                            FROM outbox)";
        let row = db.query_one_raw(sql(query, [])).await?.unwrap();
        Ok(row.try_get_by_index(0)?)
    }

    fn commute(&self, _: &PaymentSettled, _: &PaymentSettled) -> bool {
        true
    }
}

async fn run<S: Subscriber<Event = PaymentSettled>>(subscriber: fn() -> S) -> anyhow::Result<()> {
    let new_order = |number: usize| NewOrder {
        id: OrderId::mint(),
        placed_event_id: EventId::mint(),
        user_id: UserId::parse("alice").unwrap(),
        amount: Amount::new(10).unwrap(),
        description: String::new(),
        idempotency_key: number.to_string(),
        created_at: now(),
        traceparent: None,
    };
    let answers = Answers {
        subscriber,
        orders: (0..ORDERS).map(new_order).collect(),
    };
    let databases = tokio::sync::Mutex::new(Vec::new());
    run_under_faults(&answers, 15, async || {
        let database = TestDatabase::fresh().await?;
        let url = database.url.clone().into();
        databases.lock().await.push(database);
        Ok(Database::in_background(&url, "test", 2)?)
    })
    .await
}

#[tokio::test]
async fn every_order_ends_once_as_payments_decided_under_faults() {
    run(Settle::default).await.unwrap();
}

/// A faulty subscriber: it publishes an event for every delivery of an answer.
#[derive(Default)]
struct PublishesEveryDelivery(Settle);

impl Subscriber for PublishesEveryDelivery {
    type Event = PaymentSettled;
    type Effect = <Settle as Subscriber>::Effect;

    const SUBSCRIPTION: Subscription = Settle::SUBSCRIPTION;

    async fn handle(
        &self,
        txn: &Transaction,
        batch: &[Received<PaymentSettled>],
    ) -> anyhow::Result<Handled<Self::Effect>> {
        let event = |one: &Received<PaymentSettled>| {
            messaging::Message::new(EventId::mint(), &one.event, now(), None)
        };
        txn.enqueue(batch.iter().map(event).collect()).await?;
        self.0.handle(txn, batch).await
    }

    fn committed(&self, ended: Self::Effect) {
        self.0.committed(ended);
    }

    fn describe(&self, ended: &Self::Effect) -> Option<String> {
        self.0.describe(ended)
    }
}

#[tokio::test]
async fn a_handler_that_publishes_for_every_delivery_fails_under_faults() {
    let failure = run(PublishesEveryDelivery::default).await.unwrap_err();
    let failure = failure.to_string();
    assert!(failure.contains("a different result"), "{failure}");
}
