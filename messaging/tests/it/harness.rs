//! An outbox, a broker, and a relay between them.

use std::time::Duration;

use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::stream;
use messaging::broker::{Broker, BrokerConfig};
use messaging::losses::Losses;
use messaging::migration::MessagingTables;
use messaging::outbox::{self, Enqueued, Message, Model};
use messaging::outlet::Outlet;
use messaging::relay::Relay;
use messaging::topology::{self, TopologySettings};
use messaging::{Vital, db};
use sea_orm::{
    ConnectionTrait as _, DatabaseConnection, DatabaseTransaction, DbBackend, EntityTrait as _,
    QueryOrder as _, Statement, TransactionTrait as _,
};
use sea_orm_migration::{MigrationTrait, MigratorTrait};
use shared_contracts::{Amount, EventId, OrderId, OrderPlaced, UserId};
use stack::testing::{TestBroker, TestDatabase, eventually};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub(crate) const SOON: Duration = Duration::from_secs(60);

/// By this name the database knows the relays.
const RELAY: &str = "relay";

struct Migrator;

impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        vec![Box::new(MessagingTables)]
    }
}

pub(crate) struct Outbox {
    pub(crate) db: DatabaseConnection,
    pub(crate) broker: TestBroker,
    pub(crate) ops: Broker,
    pub(crate) outlet: Outlet,
    pub(crate) vital: Vital,
    pub(crate) streams_vital: Vital,
    pub(crate) shutdown: CancellationToken,
    pub(crate) database: TestDatabase,
}

pub(crate) fn event(amount: i64) -> OrderPlaced {
    OrderPlaced {
        order_id: OrderId::mint(),
        user_id: UserId::parse("alice").unwrap(),
        amount: Amount::new(amount).unwrap(),
    }
}

impl Outbox {
    pub(crate) async fn new() -> Self {
        let broker = TestBroker::start().await.unwrap();
        let database = TestDatabase::fresh().await.unwrap();
        let db = db::connect(&database.url, "test", db::Role::Flow, 4)
            .await
            .unwrap();
        db::migrate::<Migrator>(&db).await.unwrap();
        let ops = connect(&broker, "ops", &broker.secrets().nats_ops).await;
        let vital = Vital::starting("starting");
        let streams_vital = Vital::starting("starting");
        let (outlet, shutdown) = (Outlet::default(), CancellationToken::new());
        Self {
            db,
            broker,
            ops,
            outlet,
            vital,
            streams_vital,
            shutdown,
            database,
        }
    }

    /// A relay as a service runs it.
    pub(crate) async fn relay(
        &self,
        settings: &TopologySettings,
    ) -> JoinHandle<anyhow::Result<()>> {
        self.relay_for(vec![
            topology::orders_stream(settings),
            topology::dlq_stream(settings),
        ])
        .await
    }

    pub(crate) async fn relay_for(
        &self,
        streams: Vec<stream::Config>,
    ) -> JoinHandle<anyhow::Result<()>> {
        let relay = Relay {
            db: db::connect(&self.database.url, RELAY, db::Role::Flow, 4)
                .await
                .unwrap(),
            broker: connect(&self.broker, "orders", &self.broker.secrets().nats_orders).await,
            streams,
            outlet: self.outlet.clone(),
            losses: Losses::default(),
            vital: self.vital.clone(),
            streams_vital: self.streams_vital.clone(),
        };
        tokio::spawn(relay.run(self.shutdown.clone()))
    }

    /// Enqueues as many facts in one transaction and hands them to the relay.
    pub(crate) async fn enqueue(&self, number: usize) {
        let (txn, enqueued) = self.uncommitted(number).await;
        txn.commit().await.unwrap();
        self.outlet.hand_over(enqueued);
    }

    /// The same, by a process that dies before it can hand anything over.
    pub(crate) async fn leave(&self, number: usize) {
        self.uncommitted(number).await.0.commit().await.unwrap();
    }

    /// A transaction with as many facts that is still open.
    pub(crate) async fn uncommitted(&self, number: usize) -> (DatabaseTransaction, Enqueued) {
        let now = db::now();
        let messages = (0..number)
            .map(|_| Message::first(EventId::mint(), &event(1), now, None))
            .collect();
        let txn = self.db.begin().await.unwrap();
        let enqueued = outbox::enqueue(&txn, messages).await.unwrap();
        (txn, enqueued)
    }

    pub(crate) async fn rows(&self) -> Vec<Model> {
        outbox::Entity::find()
            .order_by_asc(outbox::Column::EventId)
            .all(&self.db)
            .await
            .unwrap()
    }

    pub(crate) async fn execute(&self, sql: &str) {
        self.db.execute_unprepared(sql).await.unwrap();
    }

    /// Waits until this many rows are marked as published.
    pub(crate) async fn until_published(&self, number: usize) -> Vec<Model> {
        eventually("the rows are published", SOON, async || {
            let rows = self.rows().await;
            (rows.iter().filter(|row| row.published_at.is_some()).count() == number).then_some(rows)
        })
        .await
    }

    /// Waits until no relay asks the database for anything, for now.
    pub(crate) async fn until_idle(&self) {
        let busy = format!(
            "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE '{RELAY}%'
             AND clock_timestamp() - state_change < interval '0.2 s'"
        );
        let busy = Statement::from_string(DbBackend::Postgres, busy);
        eventually("all is quiet", SOON, async || {
            self.db
                .query_one_raw(busy.clone())
                .await
                .unwrap()
                .is_none()
                .then_some(())
        })
        .await;
    }

    pub(crate) async fn message(&self, sequence: u64) -> StreamMessage {
        let stream = self.ops.jetstream().get_stream("ORDERS").await.unwrap();
        stream.get_raw_message(sequence).await.unwrap()
    }

    pub(crate) async fn messages(&self) -> u64 {
        self.ops
            .jetstream()
            .get_stream("ORDERS")
            .await
            .unwrap()
            .cached_info()
            .state
            .messages
    }
}

async fn connect(broker: &TestBroker, user: &str, password: &str) -> Broker {
    let config = BrokerConfig {
        url: broker.url(),
        user: user.to_owned(),
        password: password.to_owned(),
        name: "test".to_owned(),
    };
    let broker = Broker::connect(config).await.unwrap();
    broker.until_connected().await;
    broker
}
