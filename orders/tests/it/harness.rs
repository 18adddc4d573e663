//! Runs the service with its own database and broker. The test plays the role of payments.

use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::jetstream::message::PublishMessage;
use broker::{Broker, BrokerConfig};
use clap::Parser as _;
use messaging::{Stream, TopologySettings};
use orders::entity::order;
use orders::{App, Config};
use sea_orm::{ConnectionTrait as _, DatabaseConnection, EntityTrait as _};
use serde_json::{Value, json};
use shared_contracts::{
    Amount, Event as _, EventId, OrderId, PAYMENTS_STREAM, PaymentOutcome, PaymentSettled,
    SPEC_VERSION, UserId, header,
};
use stack::http::{Answer, Http};
use stack::testing::{InProcessService, TestBroker, TestDatabase, eventually};
use uuid::Uuid;

/// Deadline for a condition. Long enough for a busy machine; only a failing test reaches it.
pub(crate) const SOON: Duration = Duration::from_secs(20);

pub(crate) struct Orders {
    pub(crate) http: Http,
    pub(crate) db: DatabaseConnection,
    pub(crate) broker: TestBroker,
    pub(crate) database: TestDatabase,
    arguments: Vec<&'static str>,
    service: Option<InProcessService>,
}

impl Orders {
    /// Starts the service with a broker, and creates the stream of payments.
    pub(crate) async fn start() -> Self {
        Self::start_with_arguments(&[]).await
    }

    /// Like [`Self::start`], with more arguments for the service.
    pub(crate) async fn start_with_arguments(arguments: &[&'static str]) -> Self {
        let orders = Self::start_with(TestBroker::start().await.unwrap(), arguments).await;
        orders.payments().await;
        orders
    }

    /// With this broker, which may be stopped, and without the stream of payments.
    pub(crate) async fn start_with(broker: TestBroker, arguments: &[&'static str]) -> Self {
        let database = TestDatabase::fresh().await.unwrap();
        let db = database.connect().await.unwrap();
        let mut orders = Self {
            http: Http::new(""),
            db,
            broker,
            database,
            arguments: arguments.to_vec(),
            service: None,
        };
        orders.run().await;
        orders
    }

    pub(crate) async fn run(&mut self) {
        let service = self.replica().await;
        self.http = Http::new(format!("http://{}", service.address));
        self.service = Some(service);
    }

    /// Starts a replica of the service with the same database and broker.
    pub(crate) async fn replica(&self) -> InProcessService {
        let service = self.replica_unready().await;
        let http = Http::new(format!("http://{}", service.address));
        eventually("the service is ready", SOON, async || {
            http.get("/readyz")
                .await
                .ok()
                .filter(|answer| answer.status == 200)
        })
        .await;
        service
    }

    pub(crate) async fn replica_unready(&self) -> InProcessService {
        // The shared server of the tests runs without fsync.
        self.replica_with("--accept-unsafe-database").await
    }

    /// Starts a replica that does not accept the shared server of the tests.
    pub(crate) async fn strict_replica(&self) -> InProcessService {
        self.replica_with("--log-filter=info").await
    }

    async fn replica_with(&self, argument: &str) -> InProcessService {
        let arguments = [
            "orders".to_owned(),
            "--listen=127.0.0.1:0".to_owned(),
            format!("--database-url={}", self.database.url),
            format!("--nats-url={}", self.broker.url()),
            format!("--nats-password={}", self.broker.secrets().nats_orders),
            argument.to_owned(),
            "--ack-wait-ms=1000".to_owned(),
        ];
        let more = self.arguments.iter().map(|argument| (*argument).to_owned());
        let config = Config::try_parse_from(arguments.into_iter().chain(more)).unwrap();
        let service = InProcessService::start(async move |address, shutdown| {
            let app = App::build(config).await?;
            // The test may have given up waiting.
            let _ = address.send(app.address()?);
            app.run(shutdown).await
        });
        service.await.unwrap()
    }

    pub(crate) async fn stop(&mut self) {
        self.service.take().unwrap().stop().await.unwrap();
    }

    pub(crate) async fn crash(&mut self) {
        self.service.take().unwrap().crash().await.unwrap();
    }

    pub(crate) async fn place(&self, key: Option<&str>, user: &str, amount: i64) -> Answer {
        self.http
            .post(
                "/v1/orders",
                key,
                &json!({ "user_id": user, "amount": amount }),
            )
            .await
            .unwrap()
    }

    /// Places an order of alice for 10.
    pub(crate) async fn placed(&self) -> OrderId {
        let placed = self.place(None, "alice", 10).await;
        assert_eq!(placed.status, 201, "{}", placed.text());
        id(&placed.json())
    }

    pub(crate) async fn row(&self, id: OrderId) -> order::Model {
        order::Entity::find_by_id(id.as_uuid())
            .one(&self.db)
            .await
            .unwrap()
            .unwrap()
    }

    /// Inserts a copy of order `like` that was stored an hour ago and whose request is already
    /// pruned. `created_at` is an SQL expression for the time according to the service.
    pub(crate) async fn forgotten(&self, like: OrderId, created_at: &str) -> OrderId {
        let id = OrderId::mint();
        let insert = format!(
            "INSERT INTO orders (id, user_id, amount, description, idempotency_key, request_hash, placed_event_id, created_at,
                                 updated_at, stored_at)
             SELECT '{id}', user_id, amount, description, '{id}', request_hash, gen_random_uuid(), {created_at}, {created_at},
                    now() - interval '1 hour'
             FROM orders WHERE id = '{like}'"
        );
        self.db.execute_unprepared(&insert).await.unwrap();
        id
    }

    pub(crate) async fn status(&self, id: OrderId) -> String {
        self.http
            .get(&format!("/v1/orders/{id}"))
            .await
            .unwrap()
            .json()["status"]
            .as_str()
            .unwrap()
            .to_owned()
    }

    pub(crate) async fn until_status(&self, id: OrderId, status: &str) {
        eventually(status, SOON, async || {
            (self.status(id).await == status).then_some(())
        })
        .await;
    }

    pub(crate) async fn until(&self, what: &str, sql: &str, number: i64) {
        eventually(what, SOON, async || {
            (self.count(sql).await == number).then_some(())
        })
        .await;
    }

    /// Connects as the payments service and creates its stream.
    pub(crate) async fn payments(&self) -> Payments {
        let broker = Broker::connect(BrokerConfig {
            url: self.broker.url(),
            user: "payments".to_owned(),
            password: self.broker.secrets().nats_payments.clone().into(),
            name: "test".to_owned(),
        })
        .await
        .unwrap();
        broker.until_connected().await;
        // An earlier call may have created it.
        let stream = Stream::events(PAYMENTS_STREAM, "gozon.payments.>");
        let config = stream.config(&TopologySettings::default());
        let created = broker.jetstream().get_or_create_stream(config).await;
        created.unwrap();
        Payments(broker)
    }

    pub(crate) async fn count(&self, sql: &str) -> i64 {
        let statement = sea_orm::Statement::from_string(sea_orm::DbBackend::Postgres, sql);
        self.db
            .query_one_raw(statement)
            .await
            .unwrap()
            .unwrap()
            .try_get_by_index(0)
            .unwrap()
    }
}

pub(crate) fn id(order: &Value) -> OrderId {
    order["id"].as_str().unwrap().parse().unwrap()
}

/// Publishes answers as the payments service does.
pub(crate) struct Payments(Broker);

/// An answer of payments.
#[derive(Clone, Debug)]
pub(crate) struct Settlement {
    pub(crate) event: PaymentSettled,
    pub(crate) event_id: EventId,
}

/// An answer for an order of alice for 10.
pub(crate) fn settlement(order_id: OrderId, outcome: PaymentOutcome) -> Settlement {
    let event = PaymentSettled {
        order_id,
        user_id: UserId::parse("alice").unwrap(),
        amount: Amount::new(10).unwrap(),
        outcome,
    };
    Settlement {
        event,
        event_id: EventId::mint(),
    }
}

impl Payments {
    /// Publishes under a new message id, so that the broker does not drop a repetition.
    pub(crate) async fn publish(&self, settlement: &Settlement) {
        self.publish_body(
            settlement,
            serde_json::to_string(&settlement.event).unwrap(),
        )
        .await;
    }

    /// Like [`Self::publish`], with another body.
    pub(crate) async fn publish_body(&self, settlement: &Settlement, body: String) {
        let mut headers = HeaderMap::new();
        headers.insert(header::MESSAGE_ID, Uuid::new_v4().to_string());
        headers.insert(header::SPEC_VERSION, SPEC_VERSION);
        headers.insert(header::ID, settlement.event_id.to_string());
        headers.insert(header::TYPE, PaymentSettled::TYPE);
        headers.insert(header::SUBJECT, settlement.event.order_id.to_string());
        let message = PublishMessage::build()
            .headers(headers)
            .payload(body.into());
        self.0
            .jetstream()
            .send_publish(PaymentSettled::SUBJECT, message)
            .await
            .unwrap()
            .await
            .unwrap();
    }
}
