//! Limits: excess requests are rejected, so that the others are served.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::json;
use stack::http::Answer;
use stack::testing::eventually;
use tokio::sync::Notify;

use crate::harness::{Gateway, Reaction, SOON, ok};

fn statuses(answers: &[Answer]) -> (usize, usize) {
    let count = |status| {
        answers
            .iter()
            .filter(|answer| answer.status == status)
            .count()
    };
    (count(200), answers.len() - count(200))
}

#[tokio::test]
async fn requests_above_the_limit_are_rejected_at_once_with_retry_after() {
    let told = Arc::new(Notify::new());
    let answering = told.clone();
    let arguments = ["--requests-max=2", "--waits-max=1"];
    let gateway = Gateway::start_with(&arguments, move |_| {
        Reaction::AnswersWhen(answering.clone())
    })
    .await;
    let (body, http) = (json!({ "user_id": "a", "amount": 1 }), gateway.http.clone());
    let held = tokio::spawn({
        let (http, body) = (http.clone(), body.clone());
        async move {
            let (one, two, waiting) = tokio::join!(
                http.post("/v1/orders", Some("1"), &body),
                http.post("/v1/orders", Some("2"), &body),
                http.get("/v1/orders/7?wait=30")
            );
            [one.unwrap(), two.unwrap(), waiting.unwrap()]
        }
    });
    eventually("the limit is reached", SOON, async || {
        (gateway.backend.requests().len() == 3).then_some(())
    })
    .await;

    let begun = Instant::now();
    let mut refused = join_all((0..50).map(|_| http.post("/v1/orders", Some("3"), &body))).await;
    refused.push(http.get("/v1/orders/7?wait=30").await);
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "rejected only after {:?}",
        begun.elapsed()
    );
    for answer in refused.into_iter().map(Result::unwrap) {
        assert_eq!(
            (answer.status, answer.header("retry-after")),
            (503, Some("1"))
        );
        assert_eq!(answer.json()["code"], "overloaded");
        assert_eq!(
            answer.json()["outcome"],
            json!(null),
            "the request was not executed"
        );
    }
    assert_eq!(
        gateway.backend.requests().len(),
        3,
        "rejected requests did not reach the service"
    );
    assert!(gateway.rejected_count("orders_requests").await >= 50);
    assert!(gateway.rejected_count("waits").await >= 1);
    for path in ["/livez", "/readyz", "/metrics", "/openapi.json"] {
        // The backend is blocked too, but the gateway's health does not depend on it.
        assert_eq!(http.get(path).await.unwrap().status, 200, "{path}");
    }

    let answered = async {
        let held = held.await.unwrap();
        assert_eq!(statuses(&held), (3, 0), "accepted requests are answered");
    };
    tokio::select! {
        () = answered => {}
        () = async { loop { told.notify_waiters(); tokio::task::yield_now().await } } => {}
    }
}

#[tokio::test]
async fn only_requests_that_wait_for_an_order_have_a_separate_limit() {
    let gateway = Gateway::start_with(&["--requests-max=0", "--waits-max=1"], |_| {
        Reaction::Answers(ok("{}"))
    })
    .await;
    let (body, http) = (json!({ "user_id": "a", "amount": 1 }), &gateway.http);
    assert_eq!(http.get("/v1/orders/7?wait=1").await.unwrap().status, 200);
    assert_eq!(
        http.post("/v1/orders?wait=1", None, &body)
            .await
            .unwrap()
            .status,
        503
    );
    for path in [
        "/v1/orders/7",
        "/v1/orders/7?wait=0",
        "/v1/orders/7?wait=x",
        "/v1/orders?wait=1",
        "/v1/accounts/a?wait=1",
    ] {
        assert_eq!(http.get(path).await.unwrap().status, 503, "{path}");
    }
}

#[tokio::test]
async fn orders_count_for_the_user_in_the_body_whatever_the_url_says() {
    let gateway =
        Gateway::start_with(&["--rate-per-user=1"], |_| Reaction::Answers(ok("{}"))).await;
    let order = json!({ "user_id": "alice", "amount": 1 });
    let paths: Vec<String> = (0..50)
        .map(|number| format!("/v1/orders?user_id=x{number}"))
        .collect();
    let begun = Instant::now();
    let answers = join_all(
        paths
            .iter()
            .map(async |path| gateway.http.post(path, None, &order).await.unwrap()),
    )
    .await;
    let allowed = 2 + usize::try_from(begun.elapsed().as_secs()).unwrap();
    let (passed, refused) = statuses(&answers);
    assert!(
        passed <= allowed && refused > 0,
        "{passed} passed, {refused} were rejected"
    );
}

#[tokio::test]
async fn an_address_is_rate_limited_whatever_it_claims_to_be() {
    let gateway = Gateway::start_with(&["--rate-per-ip=5"], |_| Reaction::Answers(ok("{}"))).await;
    let claims: Vec<String> = (0..40).map(|number| format!("9.9.9.{number}")).collect();
    let begun = Instant::now();
    let http = &gateway.http;
    let answers = claims.iter().map(async |claim| {
        let headers = [
            ("x-forwarded-for", claim.as_str()),
            ("forwarded", "for=1.2.3.4"),
        ];
        http.request("GET", "/v1/orders", &headers, bytes::Bytes::new())
            .await
            .unwrap()
    });
    let answers: Vec<Answer> = join_all(answers).await;
    let allowed = 5 + usize::try_from(begun.elapsed().as_millis() * 5 / 1000).unwrap() + 1;
    let (passed, refused) = statuses(&answers);
    assert!(
        (5..=allowed).contains(&passed) && refused > 0,
        "{passed} passed, {refused} were rejected"
    );
    for answer in answers.iter().filter(|answer| answer.status != 200) {
        assert_eq!(
            (answer.status, answer.header("retry-after")),
            (429, Some("1")),
            "{}",
            answer.text()
        );
        assert_eq!(answer.json()["code"], "rate_limited");
        assert_eq!(
            answer.header("content-type"),
            Some("application/problem+json")
        );
    }
    assert!(gateway.rejected_count("ip_rate").await >= refused as u64);
    eventually("the address may send again", SOON, async || {
        (gateway.http.get("/v1/orders").await.unwrap().status == 200).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_user_is_rate_limited_and_others_are_not() {
    let gateway =
        Gateway::start_with(&["--rate-per-user=1"], |_| Reaction::Answers(ok("{}"))).await;
    let http = &gateway.http;
    let order = json!({ "user_id": "alice", "amount": 1 });
    let mut refused = 0;
    for round in 0..10 {
        let answers = [
            http.post("/v1/orders", None, &order).await.unwrap(),
            http.get("/v1/accounts/alice").await.unwrap(),
            http.get("/v1/accounts/%61lice").await.unwrap(),
            http.get("/v1/orders?user_id=alice").await.unwrap(),
        ];
        refused += statuses(&answers).1;
        let other = http.get(&format!("/v1/accounts/bob{round}")).await.unwrap();
        assert_eq!(other.status, 200, "another user");
        assert_eq!(
            http.get("/v1/orders").await.unwrap().status,
            200,
            "requests without a user are not limited"
        );
    }
    assert!(refused >= 20, "only {refused} of 40 were rejected");
    assert!(gateway.rejected_count("user_rate").await >= refused as u64);
}

#[tokio::test]
async fn an_event_stream_above_the_limit_is_rejected_and_counted() {
    let nats = format!(
        "--nats-url=nats://127.0.0.1:{}",
        stack::ports::free_port().unwrap()
    );
    let arguments = ["--nats-password=x", &nats, "--event-streams-max=0"];
    let gateway = Gateway::start_with(&arguments, |_| Reaction::Answers(ok("{}"))).await;
    let answer = gateway.http.get("/v1/orders/events").await.unwrap();
    assert_eq!(
        (answer.status, answer.header("retry-after")),
        (503, Some("1"))
    );
    assert_eq!(answer.json()["code"], "overloaded");
    assert!(gateway.rejected_count("event_streams").await >= 1);
}

/// With an absent counter, an alert cannot distinguish "no rejections" from "no data".
#[tokio::test]
async fn rejection_counters_start_at_zero() {
    let gateway = Gateway::start(|_| Reaction::Answers(ok("{}"))).await;
    let page = gateway.http.get("/metrics").await.unwrap().text();
    for reason in [
        "connections",
        "client_share",
        "orders_requests",
        "payments_requests",
        "waits",
        "ip_rate",
        "user_rate",
        "event_streams",
    ] {
        let series = format!("gozon_http_refused_total{{reason=\"{reason}\"}} ");
        assert!(
            page.lines().any(|line| line.starts_with(&series)),
            "{reason} is missing in {page}"
        );
    }
}

#[tokio::test]
async fn rate_limits_are_off_by_default() {
    let gateway = Gateway::start(|_| Reaction::Answers(ok("{}"))).await;
    let answers = join_all((0..400).map(|_| gateway.http.get("/v1/accounts/alice"))).await;
    assert!(
        answers
            .into_iter()
            .all(|answer| answer.unwrap().status == 200)
    );
}
