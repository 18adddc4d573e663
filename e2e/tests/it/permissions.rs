//! NATS users and PostgreSQL roles have no more permissions than they need.

use std::time::Duration;

use async_nats::{Client, ConnectOptions};
use sea_orm::{ConnectOptions as DbOptions, ConnectionTrait as _, Database};
use stack::testing::TestStack;
use tokio::sync::mpsc;

/// A connection that reports every permission violation.
struct User {
    client: Client,
    refusals: mpsc::UnboundedReceiver<String>,
}

impl User {
    async fn log_in(stack: &TestStack, name: &str, password: &str) -> Self {
        let (sender, refusals) = mpsc::unbounded_channel();
        let client = ConnectOptions::with_user_and_password(name.to_owned(), password.to_owned())
            .custom_inbox_prefix(if name == "viewer" {
                "_INBOX".to_owned()
            } else {
                format!("_INBOX_{name}")
            })
            .request_timeout(Some(Duration::from_secs(3)))
            .event_callback(move |event| {
                if let async_nats::Event::ServerError(error) = event {
                    // The receiver is gone when the test is over.
                    let _ = sender.send(error.to_string());
                }
                std::future::ready(())
            })
            .connect(stack.system.nats().url())
            .await
            .unwrap();
        Self { client, refusals }
    }

    /// Whether publishing is denied. The server answers in order, so a violation arrives before the
    /// next pong.
    async fn may_not_publish(&mut self, subject: &str) {
        self.client
            .publish(subject.to_owned(), "{}".into())
            .await
            .unwrap();
        self.refused(&format!("publish to {subject}")).await;
    }

    async fn may_not_subscribe(&mut self, subject: &str) {
        let _subscription = self.client.subscribe(subject.to_owned()).await.unwrap();
        self.refused(&format!("subscribe to {subject}")).await;
    }

    async fn refused(&mut self, what: &str) {
        self.client.flush().await.unwrap();
        let refusal = tokio::time::timeout(Duration::from_secs(5), self.refusals.recv()).await;
        let refusal = refusal
            .unwrap_or_else(|_| panic!("allowed: {what}"))
            .unwrap();
        assert!(
            refusal.to_lowercase().contains("permissions violation"),
            "{what}: {refusal}"
        );
    }

    async fn may_request(&mut self, subject: &str, body: &str) {
        let answer = self
            .client
            .request(subject.to_owned(), body.to_owned().into())
            .await;
        assert!(
            answer.is_ok(),
            "{subject}: {answer:?}, {:?}",
            self.refusals.try_recv()
        );
    }
}

#[tokio::test]
async fn each_nats_user_can_do_its_work_and_nothing_else() {
    let stack = TestStack::start().await.unwrap();
    let secrets = stack.system.folder().secrets.clone();

    let mut orders = User::log_in(&stack, "orders", &secrets.nats_orders).await;
    for subject in [
        "gozon.payments.settled",
        "gozon.dlq.payments",
        "$JS.API.STREAM.CREATE.PAYMENTS",
        "$JS.API.STREAM.UPDATE.ORDERS",
        "$JS.API.STREAM.DELETE.ORDERS",
        "$JS.API.STREAM.PURGE.ORDERS",
        "$JS.API.STREAM.MSG.DELETE.ORDERS",
        "$JS.API.CONSUMER.DELETE.PAYMENTS.orders-payment-settled",
        "$JS.API.CONSUMER.MSG.NEXT.ORDERS.payments-order-placed",
        "$JS.API.CONSUMER.CREATE.ORDERS.payments-order-placed.gozon.orders.placed",
        "$JS.ACK.ORDERS.payments-order-placed.1.1.1.1.1",
    ] {
        orders.may_not_publish(subject).await;
    }
    for subject in [
        "gozon.payments.>",
        "gozon.orders.>",
        "_INBOX.>",
        "_INBOX_payments.>",
        ">",
    ] {
        orders.may_not_subscribe(subject).await;
    }
    orders.may_request("$JS.API.STREAM.INFO.ORDERS", "").await;

    let mut payments = User::log_in(&stack, "payments", &secrets.nats_payments).await;
    for subject in [
        "gozon.orders.placed",
        "gozon.orders.finished",
        "gozon.dlq.orders",
        "$JS.API.STREAM.CREATE.ORDERS",
        "$JS.API.STREAM.UPDATE.PAYMENTS",
        "$JS.API.STREAM.PURGE.ORDERS",
        "$JS.API.CONSUMER.MSG.NEXT.PAYMENTS.orders-payment-settled",
        "$JS.ACK.PAYMENTS.orders-payment-settled.1.1.1.1.1",
    ] {
        payments.may_not_publish(subject).await;
    }
    for subject in ["gozon.orders.>", "_INBOX_orders.>", "_INBOX.>"] {
        payments.may_not_subscribe(subject).await;
    }

    let mut gateway = User::log_in(&stack, "gateway", &secrets.nats_gateway).await;
    for subject in [
        "gozon.orders.placed",
        "gozon.payments.settled",
        "gozon.dlq.orders",
        "$JS.API.STREAM.CREATE.ORDERS",
        "$JS.API.STREAM.UPDATE.ORDERS",
        "$JS.API.STREAM.DELETE.ORDERS",
        "$JS.API.STREAM.PURGE.ORDERS",
        "$JS.API.STREAM.INFO.PAYMENTS",
        "$JS.API.DIRECT.GET.PAYMENTS",
        "$JS.API.CONSUMER.CREATE.ORDERS",
        "$JS.API.CONSUMER.CREATE.ORDERS.payments-order-placed",
        "$JS.API.CONSUMER.CREATE.ORDERS.payments-order-placed.gozon.orders.placed",
        "$JS.API.CONSUMER.CREATE.ORDERS.payments-order-placed.gozon.orders.>",
        "$JS.API.CONSUMER.DURABLE.CREATE.ORDERS.payments-order-placed",
        "$JS.API.CONSUMER.CREATE.PAYMENTS.mine.gozon.payments.>",
        "$JS.API.CONSUMER.DELETE.ORDERS.payments-order-placed",
        "$JS.API.CONSUMER.MSG.NEXT.ORDERS.payments-order-placed",
        "$JS.API.CONSUMER.MSG.NEXT.PAYMENTS.orders-payment-settled",
        "$JS.ACK.ORDERS.payments-order-placed.1.1.1.1.1",
    ] {
        gateway.may_not_publish(subject).await;
    }
    for subject in ["gozon.orders.>", "_INBOX_orders.>", "_INBOX.>", ">"] {
        gateway.may_not_subscribe(subject).await;
    }
    gateway.may_request("$JS.API.STREAM.INFO.ORDERS", "").await;
    gateway
        .may_request("$JS.API.DIRECT.GET.ORDERS", r#"{"seq":1}"#)
        .await;

    let mut viewer = User::log_in(&stack, "viewer", &secrets.nats_viewer).await;
    for subject in [
        "gozon.orders.placed",
        "gozon.payments.settled",
        "gozon.dlq.orders",
        "$JS.API.STREAM.CREATE.X",
        "$JS.API.STREAM.UPDATE.ORDERS",
        "$JS.API.STREAM.DELETE.ORDERS",
        "$JS.API.STREAM.PURGE.ORDERS",
        "$JS.API.CONSUMER.DELETE.ORDERS.payments-order-placed",
        "$JS.API.CONSUMER.MSG.NEXT.ORDERS.payments-order-placed",
        "$JS.API.CONSUMER.CREATE.ORDERS.payments-order-placed.gozon.orders.placed",
        "$JS.API.CONSUMER.CREATE.ORDERS.payments-order-placed",
        "$JS.API.CONSUMER.DURABLE.CREATE.ORDERS.payments-order-placed",
        "$JS.ACK.ORDERS.payments-order-placed.1.1.1.1.1",
    ] {
        viewer.may_not_publish(subject).await;
    }
    for subject in ["gozon.>", "_INBOX_orders.>", "_INBOX_payments.>"] {
        viewer.may_not_subscribe(subject).await;
    }
    for (subject, body) in [
        ("$JS.API.INFO", ""),
        ("$JS.API.STREAM.LIST", ""),
        ("$JS.API.STREAM.NAMES", ""),
        ("$JS.API.STREAM.INFO.ORDERS", ""),
        ("$JS.API.CONSUMER.LIST.ORDERS", ""),
        ("$JS.API.CONSUMER.INFO.ORDERS.payments-order-placed", ""),
        ("$JS.API.STREAM.MSG.GET.ORDERS", r#"{"seq":1}"#),
        ("$JS.API.DIRECT.GET.ORDERS", r#"{"seq":1}"#),
    ] {
        viewer.may_request(subject, body).await;
    }

    let mut reader = User::log_in(&stack, "reader", &secrets.nats_reader).await;
    for subject in [
        "gozon.orders.placed",
        "gozon.payments.settled",
        "$JS.API.STREAM.CREATE.X",
        "$JS.API.STREAM.DELETE.ORDERS",
        "$JS.API.STREAM.PURGE.ORDERS",
        "$JS.API.STREAM.INFO.DLQ",
        "$JS.API.CONSUMER.DELETE.ORDERS.payments-order-placed",
        "$JS.API.CONSUMER.MSG.NEXT.ORDERS.payments-order-placed",
        "$JS.API.CONSUMER.CREATE.ORDERS.payments-order-placed.gozon.orders.placed",
        "$JS.API.CONSUMER.CREATE.ORDERS.reader-x",
        "$JS.API.CONSUMER.DURABLE.CREATE.ORDERS.payments-order-placed",
        "$JS.ACK.ORDERS.payments-order-placed.1.1.1.1.1",
    ] {
        reader.may_not_publish(subject).await;
    }
    for subject in ["gozon.>", "_INBOX_orders.>", "_INBOX.>"] {
        reader.may_not_subscribe(subject).await;
    }
    for (subject, body) in [
        ("$JS.API.STREAM.INFO.ORDERS", ""),
        ("$JS.API.STREAM.INFO.PAYMENTS", ""),
        ("$JS.API.DIRECT.GET.ORDERS", r#"{"seq":1}"#),
        (
            "$JS.API.CONSUMER.CREATE.ORDERS.reader-x.gozon.orders.finished",
            r#"{"stream_name":"ORDERS","config":{"durable_name":"reader-x","name":"reader-x","filter_subject":"gozon.orders.finished","ack_policy":"explicit"}}"#,
        ),
        ("$JS.API.CONSUMER.INFO.ORDERS.reader-x", ""),
        ("$JS.API.CONSUMER.DELETE.ORDERS.reader-x", ""),
    ] {
        reader.may_request(subject, body).await;
    }

    let wrong = ConnectOptions::with_user_and_password("orders".to_owned(), "wrong".to_owned())
        .connect(stack.system.nats().url())
        .await;
    assert!(wrong.is_err());
    assert!(
        async_nats::connect(stack.system.nats().url())
            .await
            .is_err(),
        "a connection without a user name is rejected"
    );
}

#[tokio::test]
async fn each_postgres_role_can_only_connect_to_its_own_database() {
    let stack = TestStack::start().await.unwrap();
    let secrets = stack.system.folder().secrets.clone();
    let postgres = stack.system.postgres();
    let enter = async |role: &str, password: &str, database: &str| {
        let mut options = DbOptions::new(postgres.url(role, password, database));
        options
            .max_connections(1)
            .connect_timeout(Duration::from_secs(3))
            .sqlx_logging(false);
        Database::connect(options).await
    };
    let (orders, payments) = (&secrets.postgres_orders, &secrets.postgres_payments);
    for (role, password, database) in [
        ("orders", orders, "payments"),
        ("orders", orders, "postgres"),
        ("payments", payments, "orders"),
        ("payments", payments, "postgres"),
        ("orders", payments, "orders"),
    ] {
        assert!(
            enter(role, password, database).await.is_err(),
            "role {role} can connect to {database}"
        );
    }
    let db = enter("payments", payments, "payments").await.unwrap();
    for forbidden in [
        "CREATE DATABASE mine",
        "CREATE ROLE mine",
        "COPY accounts TO PROGRAM 'cat'",
        "ALTER ROLE orders PASSWORD 'x'",
    ] {
        assert!(
            db.execute_unprepared(forbidden).await.is_err(),
            "{forbidden}"
        );
    }
}
