//! Runs the service with its own database and broker. The test plays the role of orders.

use std::collections::HashMap;
use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::jetstream::message::PublishMessage;
use broker::{Broker, BrokerConfig};
use clap::Parser as _;
use messaging::{Stream, TopologySettings};
use payments::entity::{account, payment, transfer};
use payments::{App, Config};
use sea_orm::{
    ConnectionTrait as _, DatabaseConnection, EntityTrait as _, PaginatorTrait as _,
    QueryOrder as _,
};
use serde_json::json;
use shared_contracts::{
    Amount, Event as _, EventId, ORDERS_STREAM, OrderId, OrderPlaced, SPEC_VERSION, UserId, header,
};
use stack::http::Http;
use stack::testing::{HeldInserts, InProcessService, TestBroker, TestDatabase, eventually};
use uuid::Uuid;

/// Deadline for a condition. Long enough for a busy machine; only a failing test reaches it.
pub(crate) const SOON: Duration = Duration::from_secs(20);

pub(crate) struct Payments {
    pub(crate) http: Http,
    pub(crate) db: DatabaseConnection,
    pub(crate) broker: TestBroker,
    database: TestDatabase,
    /// Connected as the orders service.
    orders: Broker,
    service: Option<InProcessService>,
    /// How long the broker waits for an ack, in milliseconds.
    ack_wait: u64,
}

/// A request as orders publishes it.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) event: OrderPlaced,
    pub(crate) event_id: EventId,
    pub(crate) ask: u32,
}

pub(crate) fn request(user: &str, amount: i64) -> Request {
    let event = OrderPlaced {
        order_id: OrderId::mint(),
        user_id: UserId::parse(user).unwrap(),
        amount: Amount::new(amount).unwrap(),
    };
    Request {
        event,
        event_id: EventId::mint(),
        ask: 0,
    }
}

impl Request {
    pub(crate) fn order_id(&self) -> Uuid {
        self.event.order_id.as_uuid()
    }

    /// The same request as re-ask number `ask`.
    pub(crate) fn asked(&self, ask: u32) -> Self {
        Self {
            ask,
            ..self.clone()
        }
    }

    pub(crate) fn headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(header::SPEC_VERSION, SPEC_VERSION);
        headers.insert(header::ID, self.event_id.to_string());
        headers.insert(header::TYPE, OrderPlaced::TYPE);
        headers.insert(header::SUBJECT, self.event.order_id.to_string());
        if self.ask > 0 {
            headers.insert(header::ASK, self.ask.to_string());
        }
        headers
    }
}

impl Payments {
    pub(crate) async fn start() -> Self {
        Self::start_with_ack_wait(1000).await
    }

    pub(crate) async fn start_with_ack_wait(ack_wait: u64) -> Self {
        let broker = TestBroker::start().await.unwrap();
        let database = TestDatabase::fresh().await.unwrap();
        let orders = Broker::connect(BrokerConfig {
            url: broker.url(),
            user: "orders".to_owned(),
            password: broker.secrets().nats_orders.clone().into(),
            name: "test".to_owned(),
        })
        .await
        .unwrap();
        orders.until_connected().await;
        let stream = Stream::events(ORDERS_STREAM, "gozon.orders.>");
        let config = stream.config(&TopologySettings::default());
        let created = orders.jetstream().create_stream(config).await;
        created.unwrap();
        let mut payments = Self {
            http: Http::new(""),
            db: database.connect().await.unwrap(),
            broker,
            database,
            orders,
            service: None,
            ack_wait,
        };
        payments.run().await;
        payments
    }

    /// Makes the service receive everything that `publish` publishes as one batch. An order of user
    /// `plug` blocks the service until the broker has delivered the rest.
    ///
    /// The broker answers the plug's ack on the same connection, after the rest. So when the
    /// service fetches again, all of the rest is there.
    pub(crate) async fn as_one_batch(&self, number: u64, publish: impl AsyncFnOnce()) {
        let held = self.while_blocked(number, publish).await;
        held.release().await.unwrap();
    }

    /// Like [`Self::as_one_batch`], but the service stays blocked until the result is released.
    pub(crate) async fn while_blocked(
        &self,
        number: u64,
        publish: impl AsyncFnOnce(),
    ) -> HeldInserts {
        let held = HeldInserts::blocked(self.another_connection().await, "inbox");
        let held = held.await.unwrap();
        self.publish(&request("plug", 1)).await;
        let lag = async || self.broker.lag("payments-order-placed").await;
        eventually("the plug is delivered", SOON, async || {
            (lag().await? == (0, 1)).then_some(())
        })
        .await;
        self.until_blocked().await;
        publish().await;
        eventually("the rest is delivered", SOON, async || {
            (lag().await? == (0, number + 1)).then_some(())
        })
        .await;
        held
    }

    /// Waits until the service waits in an insert that the test holds.
    pub(crate) async fn until_blocked(&self) {
        let waiting = "SELECT count(*) FROM pg_stat_activity
                       WHERE wait_event = 'PgSleep' AND datname = current_database()";
        eventually("the service waits in its transaction", SOON, async || {
            (self.count(waiting).await > 0).then_some(())
        })
        .await;
    }

    pub(crate) async fn run(&mut self) {
        let service = self.replica().await;
        self.http = Http::new(format!("http://{}", service.address));
        self.service = Some(service);
    }

    pub(crate) fn database_port(&self) -> u16 {
        self.database.port()
    }

    /// Starts a replica of the service with the same database and broker.
    pub(crate) async fn replica(&self) -> InProcessService {
        self.replica_at(self.database_port()).await
    }

    /// Like [`Self::replica`], but it reaches the database at another port of this machine.
    pub(crate) async fn replica_at(&self, port: u16) -> InProcessService {
        let database_url = self.database.url_at(port);
        let arguments = [
            "payments".to_owned(),
            "--listen=127.0.0.1:0".to_owned(),
            format!("--database-url={database_url}"),
            format!("--nats-url={}", self.broker.url()),
            format!("--nats-password={}", self.broker.secrets().nats_payments),
            // The shared server of the tests runs without fsync.
            "--accept-unsafe-database".to_owned(),
            format!("--ack-wait-ms={}", self.ack_wait),
        ];
        let config = Config::try_parse_from(arguments).unwrap();
        let service = InProcessService::start(async move |address, shutdown| {
            let app = App::build(config).await?;
            // The test may have given up waiting.
            let _ = address.send(app.address()?);
            app.run(shutdown).await
        });
        let service = service.await.unwrap();
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

    pub(crate) async fn stop(&mut self) {
        self.service.take().unwrap().stop().await.unwrap();
    }

    pub(crate) async fn crash(&mut self) {
        self.service.take().unwrap().crash().await.unwrap();
    }

    /// Opens an account over HTTP and deposits `balance`.
    pub(crate) async fn open_account(&self, user: &str, balance: i64) {
        let opened = self
            .http
            .post("/v1/accounts", None, &json!({ "user_id": user }))
            .await
            .unwrap();
        assert_eq!(opened.status, 201, "{}", opened.text());
        if balance > 0 {
            self.deposit(user, balance).await;
        }
    }

    pub(crate) async fn deposit(&self, user: &str, amount: i64) {
        let made = self
            .http
            .post(
                &format!("/v1/accounts/{user}/deposits"),
                None,
                &json!({ "amount": amount }),
            )
            .await
            .unwrap();
        assert_eq!(made.status, 201, "{}", made.text());
    }

    /// Publishes under a new message id, so that the broker does not drop a repetition.
    pub(crate) async fn publish(&self, request: &Request) {
        self.publish_raw(
            request.headers(),
            serde_json::to_string(&request.event).unwrap(),
        )
        .await;
    }

    pub(crate) async fn publish_raw(&self, mut headers: HeaderMap, body: impl Into<String>) {
        headers.insert(header::MESSAGE_ID, Uuid::new_v4().to_string());
        let message = PublishMessage::build()
            .headers(headers)
            .payload(body.into().into());
        self.orders
            .jetstream()
            .send_publish(OrderPlaced::SUBJECT, message)
            .await
            .unwrap()
            .await
            .unwrap();
    }

    /// Deletes the durable of the service, as an operator may by mistake.
    pub(crate) async fn delete_durable(&self) {
        let operator = Broker::connect(BrokerConfig {
            url: self.broker.url(),
            user: "ops".to_owned(),
            password: self.broker.secrets().nats_ops.clone().into(),
            name: "test".to_owned(),
        });
        let operator = operator.await.unwrap();
        operator.until_connected().await;
        let stream = operator.jetstream().get_stream(ORDERS_STREAM).await;
        let deleted = stream
            .unwrap()
            .delete_consumer("payments-order-placed")
            .await;
        deleted.unwrap();
    }

    /// Publishes this many requests of a user without waiting for each PubAck.
    pub(crate) async fn publish_many(&self, user: &str, number: u64) {
        let stream = self.orders.jetstream().get_stream(ORDERS_STREAM).await;
        let before = stream.unwrap().cached_info().state.messages;
        for _ in 0..number {
            let request = request(user, 1);
            let mut headers = request.headers();
            headers.insert(header::MESSAGE_ID, Uuid::new_v4().to_string());
            let body = serde_json::to_string(&request.event).unwrap();
            let client = self.orders.client();
            let published = client.publish_with_headers(OrderPlaced::SUBJECT, headers, body.into());
            published.await.unwrap();
        }
        let flushed = self.orders.client().flush().await;
        flushed.unwrap();
        eventually("the broker has stored them", SOON, async || {
            let stream = self.orders.jetstream().get_stream(ORDERS_STREAM).await;
            (stream.ok()?.cached_info().state.messages >= before + number).then_some(())
        })
        .await;
    }

    pub(crate) async fn balance(&self, user: &str) -> i64 {
        account::Entity::find_by_id(user.to_owned())
            .one(&self.db)
            .await
            .unwrap()
            .unwrap()
            .balance
    }

    pub(crate) async fn decision(&self, request: &Request) -> payment::Model {
        eventually("the order is decided", SOON, async || {
            payment::Entity::find_by_id(request.order_id())
                .one(&self.db)
                .await
                .unwrap()
        })
        .await
    }

    /// Waits until all rows of the outbox are published.
    pub(crate) async fn until_quiet(&self) {
        eventually("everything is published", SOON, async || {
            (self
                .count("SELECT count(*) FROM outbox WHERE published_at IS NULL")
                .await
                == 0)
                .then_some(())
        })
        .await;
    }

    /// Waits until the inbox has recorded this many repetitions.
    pub(crate) async fn until_repeats(&self, repeats: i64) {
        eventually("the repetitions are recorded", SOON, async || {
            (self
                .count("SELECT coalesce(sum(repeats), 0)::bigint FROM inbox")
                .await
                == repeats)
                .then_some(())
        })
        .await;
    }

    pub(crate) async fn count(&self, sql: &str) -> i64 {
        count(&self.db, sql).await
    }

    pub(crate) async fn another_connection(&self) -> DatabaseConnection {
        self.database.connect().await.unwrap()
    }

    /// Number of outbox rows about an order: its answers, and copies of its dead letters.
    pub(crate) async fn answers(&self, request: &Request) -> i64 {
        self.count(&format!(
            "SELECT count(*) FROM outbox WHERE payload LIKE '%{}%'",
            request.order_id()
        ))
        .await
    }

    pub(crate) async fn execute(&self, sql: &str) {
        self.db.execute_unprepared(sql).await.unwrap();
    }

    /// Checks that balances match the transfers, and that each paid order has exactly one transfer
    /// of its amount (I1 to I4).
    pub(crate) async fn assert_books_balance(&self) {
        let transfers: Vec<transfer::Model> = transfer::Entity::find()
            .order_by_asc(transfer::Column::EntryNo)
            .all(&self.db)
            .await
            .unwrap();
        let mut by_order: HashMap<Uuid, Vec<&transfer::Model>> = HashMap::new();
        for entry in &transfers {
            if let Some(order_id) = entry.order_id {
                by_order.entry(order_id).or_default().push(entry);
            }
        }
        for account in account::Entity::find().all(&self.db).await.unwrap() {
            let statement = &transfers;
            let mut balance = 0;
            let mut entry_no = 0;
            for entry in statement
                .iter()
                .filter(|entry| entry.user_id == account.user_id)
            {
                balance += if entry.kind == "deposit" {
                    entry.amount
                } else {
                    -entry.amount
                };
                entry_no += 1;
                assert_eq!(
                    (entry.balance_after, entry.entry_no),
                    (balance, entry_no),
                    "statement of {}",
                    account.user_id
                );
            }
            assert_eq!(
                (account.balance, account.entry_no),
                (balance, entry_no),
                "account of {}",
                account.user_id
            );
        }
        for decision in payment::Entity::find().all(&self.db).await.unwrap() {
            let of_order = by_order.get(&decision.order_id);
            let of_order: Vec<_> = of_order.into_iter().flatten().collect();
            match decision.outcome.as_str() {
                "paid" => assert_eq!(
                    of_order
                        .iter()
                        .map(|entry| (entry.id, entry.amount, entry.user_id.as_str()))
                        .collect::<Vec<_>>(),
                    [(
                        decision.transfer_id.unwrap(),
                        decision.amount,
                        decision.user_id.as_str()
                    )]
                ),
                _ => assert!(of_order.is_empty(), "a declined order was debited"),
            }
        }
    }

    pub(crate) async fn decisions(&self) -> u64 {
        payment::Entity::find().count(&self.db).await.unwrap()
    }
}

/// Runs a query that returns one number.
pub(crate) async fn count(db: &DatabaseConnection, sql: &str) -> i64 {
    let statement = sea_orm::Statement::from_string(sea_orm::DbBackend::Postgres, sql);
    db.query_one_raw(statement)
        .await
        .unwrap()
        .unwrap()
        .try_get_by_index(0)
        .unwrap()
}
