//! Faults planted in a client's history, and in the databases.

use std::process::Command;
use std::time::{Duration, Instant};

use ops::audit::{CompareWith, Databases, FindingKind, Options, Report, audit_with};
use ops::history::{Exchange, History};
use sea_orm::ConnectionTrait as _;
use serde_json::{Value, json};
use stack::http::Http;
use stack::testing::{TemporaryFolder, TestStack, eventually};

const WITHOUT_GRACE: Options = Options {
    grace: Duration::ZERO,
    stuck_after: Duration::from_secs(3600),
    late_after: Duration::from_secs(3600),
};

/// A client that records its exchanges.
struct Client {
    http: Http,
    begun: Instant,
    seen: Vec<Exchange>,
}

impl Client {
    async fn ask(&mut self, method: &str, path: &str, key: Option<&str>, body: Value) -> Exchange {
        let at = |begun: Instant| u64::try_from(begun.elapsed().as_micros()).unwrap();
        let begun_us = at(self.begun);
        let answer = match method {
            "GET" => self.http.get(path).await,
            _ => self.http.post(path, key, &body).await,
        };
        let answer = answer.unwrap();
        let exchange = Exchange {
            begun_us,
            ended_us: at(self.begun),
            method: method.to_owned(),
            path: path.to_owned(),
            key: key.map(str::to_owned),
            body,
            status: Some(answer.status),
            replayed: answer.header("idempotency-replayed") == Some("true"),
            answer: answer.text(),
        };
        self.seen.push(exchange.clone());
        exchange
    }

    async fn post(&mut self, path: &str, key: &str, body: Value) -> Exchange {
        self.ask("POST", path, Some(key), body).await
    }

    async fn get(&mut self, path: &str) -> Exchange {
        self.ask("GET", path, None, Value::Null).await
    }
}

/// A lost answer and its retry, different content under a used key, a request without a key, a
/// refused request, and reads before and after.
async fn shopping(stack: &TestStack) -> Vec<Exchange> {
    let mut client = Client {
        http: Http::new(stack.system.address("gateway")),
        begun: Instant::now(),
        seen: Vec::new(),
    };
    let order =
        |amount: i64| json!({ "user_id": "alice", "amount": amount, "description": "A lamp" });
    assert_eq!(
        client
            .post(
                "/v1/accounts/alice/deposits",
                "early",
                json!({ "amount": 5 })
            )
            .await
            .status,
        Some(404)
    );
    client
        .post("/v1/accounts", "account", json!({ "user_id": "alice" }))
        .await;
    client
        .post(
            "/v1/accounts/alice/deposits",
            "money",
            json!({ "amount": 100 }),
        )
        .await;
    client
        .post(
            "/v1/accounts/alice/deposits",
            "money",
            json!({ "amount": 100 }),
        )
        .await;
    let lamp = client.post("/v1/orders", "lamp", order(70)).await;
    // The first answer was lost: only the retry was answered.
    client.post("/v1/orders", "lost", order(20)).await;
    let lost = client.seen.last_mut().unwrap();
    (lost.status, lost.answer) = (None, String::new());
    assert!(client.post("/v1/orders", "lost", order(20)).await.replayed);
    assert_eq!(
        client.post("/v1/orders", "lamp", order(71)).await.status,
        Some(422)
    );
    assert_eq!(
        client
            .ask("POST", "/v1/orders", None, order(500))
            .await
            .status,
        Some(201)
    );
    assert_eq!(
        client.post("/v1/orders", "nothing", order(0)).await.status,
        Some(422)
    );
    let lamp: Value = serde_json::from_str(&lamp.answer).unwrap();
    let path = format!("/v1/orders/{}", lamp["id"].as_str().unwrap());
    client.get(&path).await;
    assert!(
        client
            .get(&format!("{path}?wait=30"))
            .await
            .answer
            .contains("FINISHED")
    );
    client.get("/v1/orders?user_id=alice").await;
    client.get("/v1/accounts/alice").await;
    // A request without an answer: it may have been done or not.
    client.post("/v1/orders", "gone", order(1)).await;
    let gone = client.seen.last_mut().unwrap();
    (gone.status, gone.answer) = (None, String::new());
    eventually(
        "all orders are final",
        Duration::from_secs(60),
        async || {
            let list = client.http.get("/v1/orders?status=NEW").await.ok()?.json();
            list["items"].as_array()?.is_empty().then_some(())
        },
    )
    .await;
    client.seen
}

fn of<'a>(seen: &'a mut [Exchange], key: &str) -> &'a mut Exchange {
    seen.iter_mut()
        .find(|one| one.key.as_deref() == Some(key))
        .unwrap()
}

fn last_of<'a>(seen: &'a mut [Exchange], key: &str) -> &'a mut Exchange {
    seen.iter_mut()
        .rev()
        .find(|one| one.key.as_deref() == Some(key))
        .unwrap()
}

/// Changes to the history, and what the audit must report.
type Planted = (FindingKind, &'static str, fn(&mut Vec<Exchange>));

const IN_HISTORIES: [Planted; 14] = [
    (
        FindingKind::Lost,
        "answered with 201, but not stored",
        |seen| {
            let mut another = of(seen, "lamp").clone();
            another.key = Some("never".to_owned());
            seen.push(another);
        },
    ),
    (
        FindingKind::Lost,
        "read as absent after it was confirmed",
        |seen| {
            let mut read = seen.iter().find(|one| one.method == "GET").unwrap().clone();
            (read.status, read.answer) = (Some(404), String::new());
            seen.push(read);
        },
    ),
    (
        FindingKind::Lost,
        "a request without a key, answered with 201, but not stored",
        |seen| {
            let mut another = seen
                .iter()
                .find(|one| one.key.is_none() && one.method == "POST")
                .unwrap()
                .clone();
            another.answer = another.answer.replace("\"id\":\"", "\"id\":\"0");
            seen.push(another);
        },
    ),
    (
        FindingKind::Unexpected,
        "an order that no request explains",
        |seen| seen.retain(|one| one.key.as_deref() != Some("gone")),
    ),
    (
        FindingKind::Unexpected,
        "a deposit that no request explains",
        |seen| seen.retain(|one| one.key.as_deref() != Some("money")),
    ),
    (
        FindingKind::Unexpected,
        "an order whose content no request had",
        |seen| of(seen, "gone").body["amount"] = json!(2),
    ),
    (
        FindingKind::Unexpected,
        "an order without a key that no request explains",
        |seen| {
            seen.retain(|one| one.key.is_some() || one.method == "GET");
        },
    ),
    (
        FindingKind::DoubledKey,
        "a repetition that is not marked as replayed",
        |seen| last_of(seen, "money").replayed = false,
    ),
    (
        FindingKind::AnswersDiffer,
        "a repetition with another answer",
        |seen| {
            let repetition = last_of(seen, "money");
            repetition.answer = repetition
                .answer
                .replace("\"amount\":100", "\"amount\": 100");
        },
    ),
    (
        FindingKind::DeniedButDone,
        "a denial of what is stored",
        |seen| {
            let gone = of(seen, "gone");
            (gone.status, gone.answer) = (
                Some(503),
                json!({ "code": "service_unavailable" }).to_string(),
            );
        },
    ),
    (
        FindingKind::DeniedButDone,
        "a repetition of what was denied",
        |seen| {
            let lost = of(seen, "lost");
            (lost.status, lost.answer) = (
                Some(503),
                json!({ "code": "service_unavailable" }).to_string(),
            );
        },
    ),
    (
        FindingKind::RepetitionRefused,
        "the same content refused as different content",
        |seen| {
            let mut repetition = of(seen, "lamp").clone();
            (repetition.status, repetition.answer) = (
                Some(422),
                json!({ "code": "idempotency_key_reused" }).to_string(),
            );
            seen.push(repetition);
        },
    ),
    (
        FindingKind::OtherContentApplied,
        "different content under a used key answered with 201",
        |seen| {
            let answer = of(seen, "lamp").answer.clone();
            let other = seen
                .iter_mut()
                .find(|one| one.body["amount"] == json!(71))
                .unwrap();
            (other.status, other.replayed, other.answer) = (Some(201), true, answer);
        },
    ),
    (
        FindingKind::NegativeBalance,
        "a negative balance read",
        |seen| {
            let read = seen
                .iter_mut()
                .find(|one| one.method == "GET" && one.path == "/v1/accounts/alice")
                .unwrap();
            read.answer = json!({ "user_id": "alice", "balance": -1 }).to_string();
        },
    ),
];

const BACKWARDS: [Planted; 3] = [
    (
        FindingKind::StatusBackwards,
        "a final order that was NEW later",
        |seen| {
            let mut read = seen
                .iter()
                .find(|one| one.path.contains("?wait=30"))
                .unwrap()
                .clone();
            let later = read.ended_us + 1;
            (read.begun_us, read.ended_us, read.answer) =
                (later, later, read.answer.replace("FINISHED", "NEW"));
            seen.push(read);
        },
    ),
    (
        FindingKind::StatusBackwards,
        "an order with two final states",
        |seen| {
            let mut read = seen
                .iter()
                .find(|one| one.path.contains("?wait=30"))
                .unwrap()
                .clone();
            read.answer = read.answer.replace("FINISHED", "CANCELLED");
            seen.push(read);
        },
    ),
    (
        FindingKind::StatusBackwards,
        "a final state that is not the stored one",
        |seen| {
            for read in seen.iter_mut().filter(|one| one.method == "GET") {
                read.answer = read.answer.replace("FINISHED", "CANCELLED");
            }
        },
    ),
];

/// Changes to a database (true: payments), and what the audit must report.
const IN_DATABASES: [(bool, FindingKind, &str); 5] = [
    (true, FindingKind::Lost, "DELETE FROM transfers WHERE idempotency_key = 'money'"),
    (false, FindingKind::Lost, "DELETE FROM orders WHERE idempotency_key = 'lamp'"),
    (false, FindingKind::Divergent, "UPDATE orders SET description = 'Another lamp' WHERE idempotency_key = 'lost'"),
    (false, FindingKind::OtherContentApplied, "UPDATE orders SET amount = 71 WHERE idempotency_key = 'lamp'"),
    (
        true,
        FindingKind::Unexpected,
        "INSERT INTO transfers (id, kind, user_id, entry_no, debit_account, credit_account, amount, balance_after, idempotency_key, request_hash)
         SELECT gen_random_uuid(), kind, user_id, 99, debit_account, credit_account, amount, balance_after, 'forged', request_hash
         FROM transfers WHERE idempotency_key = 'money'",
    ),
];

/// Returns the exit code of `gozon audit`.
fn gozon_audit(stack: &TestStack, history: &History) -> Option<i32> {
    let folder = TemporaryFolder::new().unwrap();
    let file = folder.path().join("history.jsonl");
    let lines: Vec<String> = history
        .exchanges
        .iter()
        .map(|one| serde_json::to_string(one).unwrap() + "\n")
        .collect();
    std::fs::write(&file, lines.concat()).unwrap();
    let postgres = stack.system.postgres();
    let output = Command::new(env!("CARGO_BIN_EXE_gozon"))
        .args(["audit", "--grace-seconds", "0", "--history"])
        .arg(&file)
        .env(
            "GOZON_ORDERS_DATABASE_URL",
            postgres.url("postgres", &postgres.password, "orders"),
        )
        .env(
            "GOZON_PAYMENTS_DATABASE_URL",
            postgres.url("postgres", &postgres.password, "payments"),
        )
        .output()
        .unwrap();
    let words = String::from_utf8_lossy(&output.stdout);
    assert!(
        words.contains(&format!(
            "compared with {} exchanges",
            history.exchanges.len()
        )),
        "{words}{output:?}"
    );
    output.status.code()
}

async fn databases(stack: &TestStack, orders: &str, payments: &str) -> Databases {
    let connect = async |name: &str| stack.system.postgres().connect(name).await.unwrap();
    Databases {
        orders: connect(orders).await,
        payments: connect(payments).await,
    }
}

fn with_history(history: &History) -> CompareWith<'_> {
    CompareWith {
        history: Some(history),
        streams: None,
    }
}

fn kinds(report: &Report) -> Vec<FindingKind> {
    report.findings.iter().map(|finding| finding.kind).collect()
}

#[tokio::test]
async fn every_fault_planted_in_or_against_a_history_is_reported() {
    let mut stack = TestStack::start().await.unwrap();
    let seen = shopping(&stack).await;
    let live = databases(&stack, "orders", "payments").await;
    let honest = History {
        exchanges: seen.clone(),
    };
    let report = audit_with(&live, Options::default(), with_history(&honest))
        .await
        .unwrap();
    assert_eq!(
        report.findings,
        [],
        "a true history of a healthy system has no findings"
    );
    assert_eq!(report.exchanges, seen.len() as u64);

    assert_eq!(gozon_audit(&stack, &honest), Some(0));
    let mut doubled = honest.clone();
    last_of(&mut doubled.exchanges, "money").replayed = false;
    assert_eq!(gozon_audit(&stack, &doubled), Some(1));

    for (kind, words, plant) in IN_HISTORIES.into_iter().chain(BACKWARDS) {
        let mut exchanges = seen.clone();
        plant(&mut exchanges);
        let report = audit_with(&live, WITHOUT_GRACE, with_history(&History { exchanges }))
            .await
            .unwrap();
        assert!(
            kinds(&report).contains(&kind),
            "{words}: {kind:?} is not among {:?}",
            report.findings
        );
    }

    // PostgreSQL copies a database only while it has no connections.
    live.orders.close().await.unwrap();
    live.payments.close().await.unwrap();
    for name in ["gateway", "orders", "payments"] {
        stack.system.stop(name).await.unwrap();
    }
    let server = stack.system.postgres().connect("postgres").await.unwrap();
    for (number, (in_payments, kind, planted)) in IN_DATABASES.into_iter().enumerate() {
        let names = [format!("orders_{number}"), format!("payments_{number}")];
        for (name, template) in names.iter().zip(["orders", "payments"]) {
            server
                .execute_unprepared(&format!("CREATE DATABASE {name} TEMPLATE {template}"))
                .await
                .unwrap();
        }
        let copies = databases(&stack, &names[0], &names[1]).await;
        let spoiled = if in_payments {
            &copies.payments
        } else {
            &copies.orders
        };
        spoiled
            .execute_unprepared(&format!(
                "SET session_replication_role = replica; {planted}"
            ))
            .await
            .unwrap();
        let report = audit_with(&copies, WITHOUT_GRACE, with_history(&honest))
            .await
            .unwrap();
        assert!(
            kinds(&report).contains(&kind),
            "{planted}: {kind:?} is not among {:?}",
            report.findings
        );
        copies.orders.close().await.unwrap();
        copies.payments.close().await.unwrap();
    }
}
