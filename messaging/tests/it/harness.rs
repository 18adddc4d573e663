//! An outbox, a broker, and the flow of a service between them.

use std::time::Duration;

use async_nats::jetstream::message::StreamMessage;
use axum::body::to_bytes;
use broker::{Broker, BrokerConfig};
use clap::Parser as _;
use messaging::{Database, Flow, FlowArgs, Message, Stream, Transaction, now};
use sea_orm::{ConnectionTrait as _, DbBackend, FromQueryResult, Statement};
use sea_orm_migration::{MigrationTrait, MigratorTrait};
use service_kit::health::Health;
use shared_contracts::{Amount, EventId, OrderId, OrderPlaced, UserId};
use stack::testing::{TestBroker, TestDatabase, eventually};
use time::OffsetDateTime;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;
use uuid::Uuid;

pub(crate) const SOON: Duration = Duration::from_secs(60);

/// The broker's permissions and the connection names contain this service name.
const SERVICE: &str = "orders";
const STREAMS: [Stream; 2] = [
    Stream::events("ORDERS", "gozon.orders.>"),
    Stream::dead_letters("DLQ", "gozon.dlq.>"),
];

struct Migrator;

impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        messaging::migrations()
    }
}

#[derive(clap::Parser)]
struct Arguments {
    #[command(flatten)]
    flow: FlowArgs,
}

pub(crate) struct Outbox {
    /// Without a hand-off to a relay.
    pub(crate) db: Database,
    pub(crate) broker: TestBroker,
    pub(crate) ops: Broker,
    pub(crate) shutdown: CancellationToken,
    pub(crate) database: TestDatabase,
}

pub(crate) struct Running {
    /// Hands off to the relay of this flow.
    db: Database,
    health: axum::Router,
    pub(crate) ended: JoinHandle<anyhow::Result<()>>,
}

#[derive(Clone, Debug, FromQueryResult)]
pub(crate) struct Row {
    pub(crate) event_id: Uuid,
    pub(crate) attempts: i32,
    pub(crate) created_at: OffsetDateTime,
    pub(crate) published_at: Option<OffsetDateTime>,
    pub(crate) stream_sequence: Option<i64>,
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
        let url = database.url.clone().into();
        let db = Database::in_background(&url, "test", 4).unwrap();
        db.migrate::<Migrator>().await.unwrap();
        let ops = Broker::connect(BrokerConfig {
            url: broker.url(),
            user: "ops".to_owned(),
            password: broker.secrets().nats_ops.clone().into(),
            name: "test".to_owned(),
        });
        let ops = ops.await.unwrap();
        ops.until_connected().await;
        Self {
            db,
            broker,
            ops,
            shutdown: CancellationToken::new(),
            database,
        }
    }

    /// Starts the flow of a service without subscriptions.
    pub(crate) async fn flow(&self) -> Running {
        self.flow_with(&[]).await
    }

    pub(crate) async fn flow_with(&self, arguments: &[&str]) -> Running {
        let mut all = vec![
            "test".to_owned(),
            format!("--database-url={}", self.database.url),
            format!("--nats-url={}", self.broker.url()),
            format!("--nats-password={}", self.broker.secrets().nats_orders),
            // The shared server of the tests runs without fsync.
            "--accept-unsafe-database".to_owned(),
        ];
        all.extend(arguments.iter().map(|one| (*one).to_owned()));
        let arguments = Arguments::parse_from(all);
        let flow = Flow::connect(SERVICE, &arguments.flow).await.unwrap();
        let flow = flow.owns(&STREAMS);
        let db = flow.background_database().clone();
        let health = flow.health(Health::default());
        let health = health.routes(CancellationToken::new());
        let ended = tokio::spawn(flow.run::<Migrator>(self.shutdown.clone()));
        Running { db, health, ended }
    }

    /// Enqueues events in one transaction without a hand-off, like a process that dies after the
    /// commit.
    pub(crate) async fn leave(&self, number: usize) {
        enqueue(&self.db, number).await.commit().await.unwrap();
    }

    /// Returns an open transaction with enqueued events, without a hand-off.
    pub(crate) async fn uncommitted(&self, number: usize) -> Transaction {
        enqueue(&self.db, number).await
    }

    pub(crate) async fn rows(&self) -> Vec<Row> {
        let query = "SELECT event_id, attempts, created_at, published_at, stream_sequence
                     FROM outbox ORDER BY event_id";
        let query = Statement::from_string(DbBackend::Postgres, query);
        Row::find_by_statement(query).all(&self.db).await.unwrap()
    }

    pub(crate) async fn execute(&self, sql: &str) {
        self.db.execute_unprepared(sql).await.unwrap();
    }

    /// Waits until this many rows are marked as published.
    pub(crate) async fn until_published(&self, number: usize) -> Vec<Row> {
        eventually("the rows are published", SOON, async || {
            let rows = self.rows().await;
            (rows.iter().filter(|row| row.published_at.is_some()).count() == number).then_some(rows)
        })
        .await
    }

    /// Waits until no relay has queried the database for a moment.
    pub(crate) async fn until_idle(&self) {
        let busy = format!(
            "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND application_name = '{SERVICE} flow'
             AND clock_timestamp() - state_change < interval '0.2 s'"
        );
        let busy = Statement::from_string(DbBackend::Postgres, busy);
        eventually("no relay queries the database", SOON, async || {
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

async fn enqueue(db: &Database, number: usize) -> Transaction {
    let message = |_| Message::new(EventId::mint(), &event(1), now(), None);
    let txn = db.begin("test").await.unwrap();
    let messages = (0..number).map(message).collect();
    txn.enqueue(messages).await.unwrap();
    txn
}

impl Running {
    /// Enqueues events in one transaction and hands them off.
    pub(crate) async fn enqueue(&self, number: usize) {
        enqueue(&self.db, number).await.commit().await.unwrap();
    }

    /// The health page's line about one part.
    pub(crate) async fn health(&self, part: &str) -> String {
        let request = axum::http::Request::get("/readyz?verbose")
            .body(axum::body::Body::empty())
            .unwrap();
        let answer = self.health.clone().oneshot(request).await.unwrap();
        let body = to_bytes(answer.into_body(), usize::MAX).await.unwrap();
        let text = String::from_utf8(body.to_vec()).unwrap();
        let mut lines = text.lines();
        let line = lines.find(|line| line.contains(&format!(" {part}: ")));
        line.unwrap_or_default().to_owned()
    }
}
