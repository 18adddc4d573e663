//! A running system with customers: sends requests as clients do, and checks both databases.

use std::collections::BTreeMap;
use std::time::Duration;

use async_nats::jetstream;
use broker::Broker;
use sea_orm::{ConnectionTrait as _, DatabaseConnection, DbBackend, QueryResult, Statement};
use serde_json::{Value, json};
use stack::http::{Answer, Http};
use stack::testing::{TestStack, eventually};
use uuid::Uuid;

/// Long enough for a busy machine.
pub(crate) const SOON: Duration = Duration::from_secs(60);

pub(crate) struct Shop {
    pub(crate) stack: TestStack,
    pub(crate) http: Http,
}

impl Shop {
    pub(crate) async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// With additional environment of the services.
    pub(crate) async fn start_with(environment: &[(&str, &str)]) -> Self {
        let environment = environment
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        Self::with_stack(TestStack::start_with(environment).await.unwrap())
    }

    /// On a running stack.
    pub(crate) fn with_stack(stack: TestStack) -> Self {
        let http = Http::new(stack.system.address("gateway"));
        Self { stack, http }
    }

    /// Retries under the same key until the request is done, as a client should.
    pub(crate) async fn until_done(&self, path: &str, body: &Value) -> Answer {
        until_done(&self.http, path, body).await
    }

    pub(crate) async fn customer(&self, user: &str, money: i64) {
        self.until_done("/v1/accounts", &json!({ "user_id": user }))
            .await;
        if money > 0 {
            self.until_done(
                &format!("/v1/accounts/{user}/deposits"),
                &json!({ "amount": money }),
            )
            .await;
        }
    }

    /// Places an order, waits until it is final, and returns status and reason.
    pub(crate) async fn order(&self, user: &str, amount: i64) -> (String, Option<String>) {
        let placed = self
            .until_done("/v1/orders", &json!({ "user_id": user, "amount": amount }))
            .await;
        let order = self
            .http
            .get(&format!(
                "/v1/orders/{}?wait=30",
                placed.json()["id"].as_str().unwrap()
            ))
            .await
            .unwrap()
            .json();
        (
            order["status"].as_str().unwrap().to_owned(),
            order["reason"].as_str().map(str::to_owned),
        )
    }

    pub(crate) async fn balance(&self, user: &str) -> i64 {
        self.http
            .get(&format!("/v1/accounts/{user}"))
            .await
            .unwrap()
            .json()["balance"]
            .as_i64()
            .unwrap()
    }

    pub(crate) async fn database(&self, name: &str) -> DatabaseConnection {
        self.stack.system.postgres().connect(name).await.unwrap()
    }

    /// Connects to the broker as user `ops`.
    pub(crate) async fn operator(&self) -> Broker {
        e2e::broker::operator(&self.stack.system).await.unwrap()
    }

    /// Publishes all messages of a stream again under new message ids; there must be at least
    /// `at_least`.
    pub(crate) async fn replay_stream(
        &self,
        broker: &Broker,
        stream: &str,
        at_least: usize,
    ) -> usize {
        let published = usize::try_from(
            e2e::broker::replay_stream(broker, stream, u64::MAX)
                .await
                .unwrap(),
        )
        .unwrap();
        assert!(published >= at_least, "{published} messages in {stream}");
        published
    }

    /// Whether both services have acknowledged everything in the streams.
    pub(crate) async fn all_acknowledged(&self, broker: &Broker) -> bool {
        for (consumer, stream) in [
            ("payments-order-placed", "ORDERS"),
            ("orders-payment-settled", "PAYMENTS"),
        ] {
            let consumer: jetstream::consumer::PullConsumer = broker
                .jetstream()
                .get_consumer_from_stream(consumer, stream)
                .await
                .unwrap();
            let info = consumer.cached_info();
            if info.num_pending > 0 || info.num_ack_pending > 0 {
                return false;
            }
        }
        true
    }

    /// All rows that are never pruned, as text.
    pub(crate) async fn permanent_rows(
        &self,
        orders: &DatabaseConnection,
        payments: &DatabaseConnection,
    ) -> Vec<String> {
        let mut books = Vec::new();
        for (db, table, key) in [
            (orders, "orders", "id"),
            (payments, "payments", "order_id"),
            (payments, "transfers", "id"),
            (payments, "accounts", "user_id"),
        ] {
            let query = format!("SELECT row_to_json(t)::text AS row FROM {table} t ORDER BY {key}");
            books.extend(
                rows(db, &query)
                    .await
                    .iter()
                    .map(|row| row.try_get::<String>("", "row").unwrap()),
            );
        }
        books
    }

    pub(crate) async fn outbox_is_empty(&self, db: &DatabaseConnection) -> bool {
        rows(db, "SELECT 1 FROM outbox").await.is_empty()
    }

    /// Whether everything that was enqueued in this database is published.
    pub(crate) async fn all_published(&self, db: &DatabaseConnection) -> bool {
        rows(db, "SELECT 1 FROM outbox WHERE published_at IS NULL")
            .await
            .is_empty()
    }

    /// Whether the broker rejected a message.
    pub(crate) async fn broker_rejected_a_message(&self, db: &DatabaseConnection) -> bool {
        !rows(
            db,
            "SELECT 1 FROM outbox WHERE published_at IS NULL AND attempts > 0",
        )
        .await
        .is_empty()
    }

    pub(crate) async fn placed(&self) -> usize {
        rows(&self.database("orders").await, "SELECT 1 FROM orders")
            .await
            .len()
    }

    pub(crate) async fn debits(&self, payments: &DatabaseConnection) -> usize {
        rows(payments, "SELECT 1 FROM transfers WHERE kind = 'payment'")
            .await
            .len()
    }

    /// Every order is final, FINISHED if and only if its amount was debited exactly once from its
    /// user, and every balance is the sum of the transfers (I1 to I4, I7). Returns the number of
    /// FINISHED orders.
    pub(crate) async fn assert_settled(&self, orders: usize) -> usize {
        let (orders_db, payments_db) = (
            self.database("orders").await,
            self.database("payments").await,
        );
        eventually("every order is final", SOON, async || {
            let new = rows(
                &orders_db,
                "SELECT count(*) AS n FROM orders WHERE status = 'NEW'",
            )
            .await;
            (new[0].try_get::<i64>("", "n").unwrap() == 0).then_some(())
        })
        .await;
        let order = |row: &QueryResult, key: &str| {
            let id: Uuid = row.try_get("", key).unwrap();
            (
                id,
                (
                    row.try_get::<String>("", "user_id").unwrap(),
                    row.try_get::<i64>("", "amount").unwrap(),
                ),
            )
        };
        let all = rows(&orders_db, "SELECT id, user_id, amount, status FROM orders").await;
        assert_eq!(all.len(), orders, "exactly the accepted orders are stored");
        let finished: BTreeMap<_, _> = all
            .iter()
            .filter(|row| row.try_get::<String>("", "status").unwrap() == "FINISHED")
            .map(|row| order(row, "id"))
            .collect();
        let debits = rows(
            &payments_db,
            "SELECT order_id, user_id, amount FROM transfers WHERE kind = 'payment'",
        )
        .await;
        let debited: BTreeMap<_, _> = debits.iter().map(|row| order(row, "order_id")).collect();
        assert_eq!(debits.len(), debited.len(), "no order was debited twice");
        assert_eq!(debited, finished, "finished orders and debits are the same");
        let drift = rows(
            &payments_db,
            "SELECT a.user_id FROM accounts a LEFT JOIN transfers t USING (user_id) GROUP BY a.user_id
             HAVING a.balance <> coalesce(sum(CASE t.kind WHEN 'deposit' THEN t.amount ELSE -t.amount END), 0) OR a.balance < 0",
        )
        .await;
        assert!(drift.is_empty(), "each balance is the sum of the transfers");
        for db in [&orders_db, &payments_db] {
            eventually("all outbox rows are published", SOON, async || {
                self.all_published(db).await.then_some(())
            })
            .await;
            assert!(
                rows(db, "SELECT 1 FROM dead_letters").await.is_empty(),
                "there are no dead letters"
            );
        }
        finished.len()
    }
}

async fn rows(db: &DatabaseConnection, sql: &str) -> Vec<QueryResult> {
    db.query_all_raw(Statement::from_string(DbBackend::Postgres, sql))
        .await
        .unwrap()
}

/// Sends a POST with a new key and retries it until it is done.
pub(crate) async fn until_done(http: &Http, path: &str, body: &Value) -> Answer {
    e2e::until_done(http, path, body, SOON).await.unwrap()
}

/// The duration of a fault, not a wait for a condition.
pub(crate) async fn fault_lasts(time: Duration) {
    tokio::time::sleep(time).await;
}
