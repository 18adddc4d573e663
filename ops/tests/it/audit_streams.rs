//! Faults planted in the streams of a healthy system.

use std::process::{Command, Output};

use async_nats::HeaderMap;
use ops::audit::{CompareWith, Finding, FindingKind, Report, audit_with};
use ops::{dead_letters, outbox};
use serde_json::{Value, json};
use stack::testing::eventually;
use uuid::Uuid;

use crate::harness::{SOON, TestShop, WITHOUT_GRACE};

const PLACED: (&str, &str) = ("gozon.orders.placed", "gozon.order.placed.v1");
const SETTLED: (&str, &str) = ("gozon.payments.settled", "gozon.payment.settled.v1");
const FINISHED: (&str, &str) = ("gozon.orders.finished", "gozon.order.finished.v1");
const CANCELLED: (&str, &str) = ("gozon.orders.cancelled", "gozon.order.cancelled.v1");
const UNKNOWN_ORDER: &str = "01933f3c-7d5a-7b60-9d6f-000000000099";

impl TestShop {
    async fn audit(&self) -> Report {
        let compare_with = CompareWith {
            streams: Some(self.broker.jetstream()),
            history: None,
        };
        audit_with(&self.databases, WITHOUT_GRACE, compare_with)
            .await
            .unwrap()
    }

    /// Publishes a forged message with the broker's credentials. Without `event_id`, it gets a new
    /// id. With an empty `event_id`, it has no headers.
    async fn publish_forged(
        &self,
        (subject, kind): (&'static str, &str),
        event_id: Option<&str>,
        body: &Value,
    ) -> u64 {
        let minted = Uuid::now_v7().to_string();
        let mut headers = HeaderMap::new();
        let order_id = body["order_id"].as_str().unwrap_or_default();
        for (name, value) in [
            ("ce-specversion", "1.0"),
            ("ce-type", kind),
            ("ce-subject", order_id),
            ("ce-id", event_id.unwrap_or(&minted)),
        ] {
            headers.insert(name, value);
        }
        if event_id == Some("") {
            headers = HeaderMap::new();
        }
        let sent = self
            .broker
            .jetstream()
            .publish_with_headers(subject, headers, body.to_string().into())
            .await;
        sent.unwrap().await.unwrap().sequence
    }

    /// Places orders, waits until they are final and all their events are published. The money is
    /// enough for three; the others are declined.
    async fn place_orders(&self, number: usize) -> Vec<Value> {
        let mut orders = Vec::new();
        for _ in 0..number {
            let id = self.place().await;
            let order = self
                .http
                .get(&format!("/v1/orders/{id}?wait=30"))
                .await
                .unwrap()
                .json();
            assert_ne!(order["status"], "NEW");
            orders.push(order);
        }
        eventually("all events are published", SOON, async || {
            let outboxes = outbox::status(&self.databases).await.unwrap();
            outboxes
                .iter()
                .all(|outbox| outbox.pending == 0)
                .then_some(())
        })
        .await;
        orders
    }

    fn gozon_audit(&self, arguments: &[&str], nats_url: &str) -> Output {
        let postgres = self.stack.system.postgres();
        Command::new(env!("CARGO_BIN_EXE_gozon"))
            .args(["audit", "--grace-seconds", "0"])
            .args(arguments)
            .env(
                "GOZON_ORDERS_DATABASE_URL",
                postgres.url("postgres", &postgres.password, "orders"),
            )
            .env(
                "GOZON_PAYMENTS_DATABASE_URL",
                postgres.url("postgres", &postgres.password, "payments"),
            )
            .env("NATS_URL", nats_url)
            .env(
                "NATS_OPS_PASSWORD",
                &self.stack.system.folder().secrets.nats_ops,
            )
            .output()
            .unwrap()
    }
}

fn body_about(order: &Value, more: &Value) -> Value {
    let mut body =
        json!({ "order_id": order["id"], "user_id": order["user_id"], "amount": order["amount"] });
    body.as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    body
}

fn kinds_and_ids(report: &Report) -> Vec<(FindingKind, String)> {
    report
        .findings
        .iter()
        .map(|finding| (finding.kind, finding.id.clone()))
        .collect()
}

struct Planter<'a> {
    shop: &'a TestShop,
    planted: Vec<(FindingKind, String)>,
}

impl Planter<'_> {
    /// Publishes a message that the audit must report: under `id`, or under its position in the
    /// stream, with these words, and without any other new finding.
    async fn plant(
        &mut self,
        kind: FindingKind,
        id: Option<&str>,
        words: &str,
        what: (&'static str, &str),
        event_id: Option<&str>,
        body: Value,
    ) {
        let sequence = self.shop.publish_forged(what, event_id, &body).await;
        let stream = if what == SETTLED {
            "PAYMENTS"
        } else {
            "ORDERS"
        };
        let id = id.map_or_else(|| format!("{stream} {sequence}"), str::to_owned);
        let report = self.shop.audit().await;
        let finding = report
            .findings
            .iter()
            .find(|finding| (finding.kind, &finding.id) == (kind, &id));
        let finding: &Finding =
            finding.unwrap_or_else(|| panic!("{kind:?} of {id} ({words}): {:?}", report.findings));
        assert!(
            finding.detail.contains(words) && finding.detail.contains(what.0),
            "{finding:?}"
        );
        self.planted.push((kind, id));
        assert_eq!(
            report.findings.len(),
            self.planted.len(),
            "there are other findings: {:?}",
            report.findings
        );
    }
}

#[tokio::test]
async fn every_fault_planted_in_a_stream_is_reported_once() {
    let mut shop = TestShop::start().await;
    let orders = shop.place_orders(13).await;
    let report = shop.audit().await;
    assert_eq!(
        (&report.findings, &report.not_looked_at),
        (&vec![], &vec![]),
        "a healthy, running system has no findings"
    );
    assert_eq!(report.messages, 39);
    let healthy = shop.stack.system.nats().url();
    for name in ["orders", "payments"] {
        shop.stack.system.stop(name).await.unwrap();
    }

    let paid = json!({ "outcome": "paid" });
    let refused = |reason: &str| json!({ "outcome": "declined", "reason": reason });
    let unknown = json!({ "id": UNKNOWN_ORDER, "user_id": "alice", "amount": 30 });
    let with = |mut body: Value, field: &str, value: Value| {
        body[field] = value;
        body
    };
    // Messages that the services read. They would become dead letters, but the services are down.
    let mut planter = Planter {
        shop: &shop,
        planted: Vec::new(),
    };
    use FindingKind::{FalseMessage, ForeignMessage, UnreadableMessage};
    planter
        .plant(
            FalseMessage,
            Some(UNKNOWN_ORDER),
            "the order has no decision",
            SETTLED,
            None,
            body_about(&unknown, &paid),
        )
        .await;
    for (number, words, what, body) in [
        (
            0,
            "of mallory",
            SETTLED,
            with(body_about(&orders[0], &paid), "user_id", json!("mallory")),
        ),
        (
            1,
            "message: amount 31",
            SETTLED,
            with(body_about(&orders[1], &paid), "amount", json!(31)),
        ),
        (
            2,
            "message: declined, insufficient_funds; row: paid",
            SETTLED,
            body_about(&orders[2], &refused("insufficient_funds")),
        ),
        (
            3,
            "message: declined, no_account",
            SETTLED,
            body_about(&orders[3], &refused("no_account")),
        ),
        (
            4,
            "message: paid; row: declined",
            SETTLED,
            body_about(&orders[4], &paid),
        ),
        (
            5,
            "message: amount 29",
            PLACED,
            with(body_about(&orders[5], &json!({})), "amount", json!(29)),
        ),
    ] {
        planter
            .plant(
                FalseMessage,
                orders[number]["id"].as_str(),
                words,
                what,
                None,
                body,
            )
            .await;
    }
    let another = "01933f3c-7d5a-7b60-9d6f-000000000098";
    let unknown = json!({ "id": another, "user_id": "alice", "amount": 30 });
    planter
        .plant(
            UnreadableMessage,
            None,
            "is missing",
            SETTLED,
            Some(""),
            json!({ "order_id": another }),
        )
        .await;
    planter
        .plant(
            UnreadableMessage,
            None,
            "not a valid gozon.order.placed.v1",
            PLACED,
            None,
            json!({ "order_id": another }),
        )
        .await;
    let read_by_services = planter.planted.len();

    // Messages that no service reads, and messages that have no effect.
    planter
        .plant(
            FalseMessage,
            Some(another),
            "the order does not exist",
            FINISHED,
            None,
            body_about(&unknown, &json!({})),
        )
        .await;
    for (number, words, what, body) in [
        (
            6,
            "message: FINISHED; row: CANCELLED",
            FINISHED,
            body_about(&orders[6], &json!({})),
        ),
        (
            7,
            "message: CANCELLED, no_account",
            CANCELLED,
            body_about(&orders[7], &json!({ "reason": "no_account" })),
        ),
    ] {
        planter
            .plant(
                FalseMessage,
                orders[number]["id"].as_str(),
                words,
                what,
                None,
                body,
            )
            .await;
    }
    for (number, what, more) in [
        (8, PLACED, json!({})),
        (9, SETTLED, refused("insufficient_funds")),
        (10, CANCELLED, json!({ "reason": "insufficient_funds" })),
    ] {
        let event_id = Uuid::now_v7().to_string();
        let words = orders[number]["id"].as_str().unwrap();
        planter
            .plant(
                ForeignMessage,
                Some(&event_id),
                words,
                what,
                Some(&event_id),
                body_about(&orders[number], &more),
            )
            .await;
    }
    let Planter { mut planted, .. } = planter;

    let output = shop.gozon_audit(&[], &healthy);
    let words = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(1), "{words}");
    assert!(
        words.contains("compared with 54 messages in the streams")
            && words.contains("false_message"),
        "{words}"
    );
    assert_eq!(
        shop.gozon_audit(&["--no-streams"], &healthy).status.code(),
        Some(0)
    );

    // The services quarantine what they read. Now the audit reports only the dead letters.
    for name in ["orders", "payments"] {
        shop.stack.system.start(name).await.unwrap();
    }
    let letters = eventually("all dead letters are stored", SOON, async || {
        let letters = dead_letters::list(&shop.databases).await.unwrap();
        (letters.len() == read_by_services).then_some(letters)
    })
    .await;
    let mut expected: Vec<_> = letters
        .iter()
        .map(|letter| (FindingKind::DeadLetter, letter.id.to_string()))
        .collect();
    expected.extend(planted.drain(..).skip(read_by_services));
    expected.sort();
    let mut found = kinds_and_ids(&shop.audit().await);
    found.sort();
    assert_eq!(found, expected);
    // A replayed dead letter comes back. A dropped one is not a finding, although its message stays
    // in the stream.
    for letter in &letters {
        shop.replay(letter).await;
    }
    eventually("all dead letters are back", SOON, async || {
        let letters = dead_letters::list(&shop.databases).await.unwrap();
        letters
            .iter()
            .all(|letter| letter.times == 2 && letter.waits)
            .then_some(())
    })
    .await;
    for letter in &letters {
        dead_letters::remove(&shop.databases, letter).await.unwrap();
    }
    expected.retain(|(kind, _)| *kind != FindingKind::DeadLetter);
    let mut found = kinds_and_ids(&shop.audit().await);
    found.sort();
    assert_eq!(found, expected);
}

#[tokio::test]
async fn an_order_that_exists_only_in_the_stream_is_reported() {
    let mut shop = TestShop::start().await;
    shop.place_orders(1).await;
    shop.stack.system.stop("payments").await.unwrap();
    let unknown = json!({ "id": UNKNOWN_ORDER, "user_id": "alice", "amount": 30 });
    shop.publish_forged(PLACED, None, &body_about(&unknown, &json!({})))
        .await;
    let report = shop.audit().await;
    assert_eq!(
        kinds_and_ids(&report),
        [(FindingKind::FalseMessage, UNKNOWN_ORDER.to_owned())]
    );
    assert!(
        report.findings[0]
            .detail
            .contains("the order does not exist"),
        "{:?}",
        report.findings
    );
}

#[tokio::test]
async fn without_the_broker_or_its_streams_the_audit_continues_and_says_so() {
    let mut shop = TestShop::start().await;
    shop.place_orders(1).await;
    let url = shop.stack.system.nats().url();
    for name in ["orders", "payments", "gateway"] {
        shop.stack.system.stop(name).await.unwrap();
    }
    let fine = shop.gozon_audit(&["--json"], &url);
    let report: Value = serde_json::from_slice(&fine.stdout).unwrap();
    assert_eq!(
        (&report["messages"], &report["not_looked_at"]),
        (&json!(3), &json!([])),
        "{fine:?}"
    );

    shop.broker
        .jetstream()
        .delete_stream("PAYMENTS")
        .await
        .unwrap();
    let words = String::from_utf8(shop.gozon_audit(&[], &url).stdout).unwrap();
    assert!(
        words.contains("compared with 2 messages")
            && words.contains("not checked: stream PAYMENTS: it does not exist"),
        "{words}"
    );

    shop.stack.system.stop("nats").await.unwrap();
    let away = shop.gozon_audit(&[], &url);
    let words = String::from_utf8(away.stdout).unwrap();
    assert_eq!(away.status.code(), Some(0), "{words}");
    assert!(
        words.contains("not checked: the streams: NATS at ") && words.contains("is consistent"),
        "{words}"
    );
    let words = String::from_utf8(shop.gozon_audit(&["--no-streams"], &url).stdout).unwrap();
    assert!(
        !words.contains("streams") && words.contains("is consistent"),
        "{words}"
    );
}
