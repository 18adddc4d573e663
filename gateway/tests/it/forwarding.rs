//! What is handed on, what is not, and what is said when a service is away.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use bytes::Bytes;
use serde_json::json;
use stack::http::Http;
use stack::testing::{Apart, eventually};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use crate::harness::{Does, Gateway, SOON, ok};

#[tokio::test]
async fn only_what_is_known_is_handed_on_in_both_directions() {
    let gateway = Gateway::start(|_| {
        Does::Answers(
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\nset-cookie: a=b\r\nserver: innards/1.0\r\n\
             x-internal: secret\r\nkeep-alive: timeout=9\r\nidempotency-replayed: true\r\nlocation: /v1/orders/7\r\n\r\n{}"
                .to_owned(),
        )
    })
    .await;
    let traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let answer = gateway
        .say(&format!(
            "POST /v1/orders?a=%20b HTTP/1.1\r\nHost: evil.example\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\
             Content-Encoding: gzip\r\nConnection: close, X-Secret\r\nX-Secret: 1\r\nKeep-Alive: timeout=5\r\nTE: trailers\r\nUpgrade: h2c\r\n\
             Proxy-Authorization: Basic eA==\r\nCookie: session=1\r\nAuthorization: Bearer x\r\nX-Forwarded-For: 6.6.6.6\r\n\
             X-User-Id: root\r\nIdempotency-Key: k\r\nX-Request-Id: find-me\r\ntraceparent: {traceparent}\r\ntracestate: a=1\r\n\r\n{{}}"
        ))
        .await;
    let seen = gateway.behind.seen().remove(0);
    let names: Vec<&str> = seen.headers.iter().map(|(name, _)| name.as_str()).collect();
    let mut sorted = names.clone();
    sorted.sort_unstable();
    let known = [
        "content-encoding",
        "content-length",
        "content-type",
        "host",
        "idempotency-key",
        "traceparent",
        "tracestate",
        "x-request-id",
    ];
    assert_eq!(sorted, known);
    assert_eq!(
        (seen.line.as_str(), seen.body.as_str()),
        ("POST /v1/orders?a=%20b", "{}")
    );
    assert_eq!(
        seen.header("host"),
        Some(gateway.behind.address.to_string().as_str())
    );
    assert_eq!(
        (seen.header("traceparent"), seen.header("x-request-id")),
        (Some(traceparent), Some("find-me"))
    );

    let head = answer.split_once("\r\n\r\n").unwrap().0;
    for kept in [
        "idempotency-replayed: true",
        "location: /v1/orders/7",
        "x-request-id: find-me",
    ] {
        assert!(head.contains(kept), "{kept} in {head}");
    }
    for dropped in ["set-cookie", "server", "x-internal", "keep-alive", "secret"] {
        assert!(!head.contains(dropped), "{dropped} in {head}");
    }
}

#[tokio::test]
async fn a_get_says_nothing_in_a_body_and_an_unknown_path_is_not_handed_on() {
    let gateway = Gateway::start(|_| Does::Answers(ok("{}"))).await;
    let answer = gateway
        .http
        .request("GET", "/v1/orders", &[], Bytes::from_static(b"surprise"))
        .await
        .unwrap();
    assert_eq!(
        (answer.status, gateway.behind.seen()[0].body.as_str()),
        (200, "")
    );
    for (method, path) in [
        ("GET", "/v2/orders"),
        ("GET", "/v1/orders/"),
        ("GET", "/v1//orders"),
        ("GET", "/V1/orders"),
        ("DELETE", "/v1/orders/7"),
        ("GET", "/v1/accounts"),
        ("POST", "/readyz"),
    ] {
        let answer = gateway
            .http
            .request(method, path, &[], Bytes::new())
            .await
            .unwrap();
        assert!(
            matches!(answer.status, 404 | 405),
            "{method} {path}: {}",
            answer.text()
        );
    }
    assert_eq!(gateway.behind.seen().len(), 1);
}

#[tokio::test]
async fn a_head_is_answered_as_a_get_without_its_body() {
    let id = "01933f3c-7d5a-7b60-9d6f-3f0b4b1f2a11";
    let gateway = Gateway::start(|_| {
        Does::Answers(ok(r#"{"steps":[],"items":[],"missing":[],"pruned":false}"#))
    })
    .await;
    let of_the_api = [
        "",
        &format!("/{id}"),
        &format!("/{id}/timeline"),
        "/nonsense/timeline",
        &format!("/{id}/events"),
        "/events",
    ];
    let mut paths: Vec<String> = of_the_api
        .iter()
        .map(|path| format!("/v1/orders{path}"))
        .collect();
    paths.extend(
        [
            "/v1/accounts/alice",
            "/v1/accounts/alice/entries",
            "/v1/ops/flow",
            "/v1/ops/dead-letters",
        ]
        .map(str::to_owned),
    );
    paths.extend(
        [
            "/",
            "/assets/app.js",
            "/assets/nothing.js",
            "/nowhere",
            "/livez",
            "/readyz",
            "/metrics",
        ]
        .map(str::to_owned),
    );
    paths.extend(
        [
            "/swagger/",
            "/openapi.json",
            "/openapi.yaml",
            "/openapi/orders.json",
            "/openapi/payments.json",
        ]
        .map(str::to_owned),
    );
    for path in paths {
        let get = gateway.http.get(&path).await.unwrap();
        let head = gateway
            .http
            .request("HEAD", &path, &[], Bytes::new())
            .await
            .unwrap();
        assert_eq!(
            (head.status, head.header("content-type")),
            (get.status, get.header("content-type")),
            "{path}"
        );
        assert!(head.body.is_empty(), "{path}");
        let length = head.header("content-length");
        // What is counted changes between two requests, and may have grown by a digit.
        if path != "/metrics" {
            assert!(
                length.is_none() || length == get.header("content-length"),
                "{path}: {length:?}, but {get:?}"
            );
        }
    }
    assert!(
        gateway
            .behind
            .seen()
            .iter()
            .all(|seen| seen.line.starts_with("GET ")),
        "services are asked for what is answered"
    );
}

/// A request id and a trace lead through all services.
#[tokio::test]
async fn every_request_that_one_leads_to_carries_its_id_and_its_trace() {
    let id = "01933f3c-7d5a-7b60-9d6f-3f0b4b1f2a11";
    let gateway = Gateway::start(|_| {
        Does::Answers(ok(r#"{"steps":[],"items":[],"missing":[],"pruned":false}"#))
    })
    .await;
    let traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let headers = [
        ("x-request-id", "find-me"),
        ("traceparent", traceparent),
        ("cookie", "session=1"),
    ];
    for (path, asked) in [
        (format!("/v1/orders/{id}/timeline"), 2),
        ("/v1/ops/flow".to_owned(), 2),
        ("/v1/ops/dead-letters".to_owned(), 2),
    ] {
        let before = gateway.behind.seen().len();
        assert_eq!(
            gateway
                .http
                .request("GET", &path, &headers, Bytes::new())
                .await
                .unwrap()
                .status,
            200,
            "{path}"
        );
        let seen = gateway.behind.seen().split_off(before);
        assert_eq!(seen.len(), asked, "{path}");
        for seen in seen {
            let told = (
                seen.header("x-request-id"),
                seen.header("traceparent"),
                seen.header("cookie"),
            );
            assert_eq!(
                told,
                (Some("find-me"), Some(traceparent), None),
                "{path}: {}",
                seen.line
            );
        }
    }
}

#[tokio::test]
async fn whoever_follows_an_order_leaves_a_trace_too() {
    let nats = format!(
        "--nats-url=nats://127.0.0.1:{}",
        stack::ports::free_port().unwrap()
    );
    let gateway =
        Gateway::start_with(&["--nats-password=x", &nats], |_| Does::Answers(ok("{}"))).await;
    let traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let request = format!(
        "GET /v1/orders/01933f3c-7d5a-7b60-9d6f-3f0b4b1f2a11/events HTTP/1.1\r\nHost: x\r\nX-Request-Id: find-me\r\n\
         traceparent: {traceparent}\r\n\r\n"
    );
    let mut follower = TcpStream::connect(gateway.address).await.unwrap();
    follower.write_all(request.as_bytes()).await.unwrap();
    let seen = eventually("the order is asked for", SOON, async || {
        gateway.behind.seen().pop()
    })
    .await;
    assert_eq!(
        (seen.header("x-request-id"), seen.header("traceparent")),
        (Some("find-me"), Some(traceparent))
    );
}

#[tokio::test]
async fn a_service_that_is_away_is_named_with_what_to_do() {
    let gateway = Gateway::start(|_| {
        Does::AnswersAndCloses("HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{".to_owned())
    })
    .await;
    for (path, body, words) in [
        (
            "/v1/orders",
            json!({ "user_id": "a", "amount": 1 }),
            "Orders Service temporarily unavailable.",
        ),
        (
            "/v1/accounts/a/deposits",
            json!({ "amount": 1 }),
            "Payments Service temporarily unavailable.",
        ),
    ] {
        for key in [Some("mine"), None] {
            let before = gateway.behind.seen().len();
            let answer = gateway.http.post(path, key, &body).await.unwrap();
            assert_eq!(
                (answer.status, answer.header("retry-after")),
                (503, Some("1")),
                "{}",
                answer.text()
            );
            let document = answer.json();
            let detail = document["detail"].as_str().unwrap();
            assert!(
                detail.starts_with(words) && detail.contains("idempotency_key"),
                "{detail}"
            );
            assert_eq!(document["outcome"], "unknown");
            let seen = gateway.behind.seen();
            assert_eq!(
                seen.len(),
                before + 1,
                "what may have been done is not sent again"
            );
            let sent = seen[before].header("idempotency-key").unwrap();
            assert_eq!(
                document["idempotency_key"], sent,
                "the key it was sent with, whoever made it"
            );
            assert!(key.is_none_or(|key| key == sent));
        }
    }
    let answer = gateway.http.get("/v1/orders/7").await.unwrap();
    assert_eq!(
        (answer.status, &answer.json()["outcome"]),
        (503, &json!(null)),
        "a GET has no outcome"
    );
}

/// A gateway before an orders service that is not one of [`Gateway::start`]'s.
async fn before(orders: &str) -> (Apart, Http) {
    let config = [
        "gateway",
        "--listen=127.0.0.1:0",
        &format!("--orders-url=http://{orders}"),
    ];
    let config = <gateway::Config as clap::Parser>::try_parse_from(config).unwrap();
    let gateway = Apart::start(async move |address, shutdown| {
        let app = gateway::App::build(config).await?;
        // The test may have given up waiting.
        let _ = address.send(app.address()?);
        app.run(shutdown).await
    });
    let gateway = gateway.await.unwrap();
    let http = Http::new(format!("http://{}", gateway.address));
    (gateway, http)
}

#[tokio::test]
async fn a_service_that_cannot_be_reached_has_done_nothing() {
    let free = stack::ports::free_port().unwrap();
    let (gateway, http) = before(&format!("127.0.0.1:{free}")).await;
    let answer = http.post("/v1/orders", None, &json!({})).await.unwrap();
    assert_eq!(
        (answer.status, answer.header("retry-after")),
        (503, Some("1"))
    );
    assert_eq!(
        answer.json()["detail"],
        "Orders Service temporarily unavailable. Wait as long as Retry-After says, then send the request again with the \
         same Idempotency-Key."
    );
    assert_eq!(
        (&answer.json()["outcome"], &answer.json()["idempotency_key"]),
        (&json!(null), &json!(null))
    );
    assert_eq!(
        http.get("/readyz").await.unwrap().status,
        200,
        "nobody's health depends on another's"
    );
    gateway.stop().await.unwrap();
}

#[tokio::test]
async fn connections_are_used_again_and_one_that_the_service_has_closed_hurts_nobody() {
    let gateway = Gateway::start(|_| Does::AnswersAndCloses(ok("{}"))).await;
    for number in 0..20 {
        let answer = gateway
            .http
            .post("/v1/orders", None, &json!({}))
            .await
            .unwrap();
        assert_eq!(answer.status, 200, "{number}: {}", answer.text());
    }
    assert_eq!(gateway.behind.seen().len(), 20, "each was sent once");
}

#[tokio::test]
async fn an_answer_that_is_nonsense_or_too_large_is_not_handed_on() {
    let huge = ok(&"x".repeat(2 * 1024 * 1024));
    let gateway = Gateway::start(move |seen| {
        Does::AnswersAndCloses(match seen.line.as_str() {
            "GET /v1/orders/huge" => huge.clone(),
            _ => "SSH-2.0-OpenSSH_9.2\r\n\r\n".to_owned(),
        })
    })
    .await;
    for path in ["/v1/orders/huge", "/v1/orders/nonsense"] {
        let answer = gateway.http.get(path).await.unwrap();
        assert_eq!(
            (answer.status, &answer.json()["code"]),
            (503, &json!("service_unavailable")),
            "{path}"
        );
        assert!(!answer.text().contains("SSH"), "no innards");
    }
}

/// The service under the same outermost layer as ours, with a handler that panics.
#[tokio::test]
async fn a_panic_names_the_key_that_the_gateway_made() {
    let seen = Arc::new(Mutex::new(String::new()));
    let keys = seen.clone();
    let panics = async move |headers: HeaderMap| -> StatusCode {
        *keys.lock().unwrap() = headers["idempotency-key"].to_str().unwrap().to_owned();
        panic!("a bug of ours")
    };
    let router = service_kit::http::edge(Router::new().route("/v1/orders", post(panics)));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (_gateway, http) = before(&listener.local_addr().unwrap().to_string()).await;
    let serving = tokio::spawn(service_kit::server::serve(
        listener,
        router,
        CancellationToken::new(),
    ));
    let answer = http
        .post("/v1/orders", None, &json!({ "user_id": "a", "amount": 1 }))
        .await
        .unwrap();
    let told = answer.json();
    assert_eq!(
        (answer.status, &told["code"], &told["outcome"]),
        (500, &json!("internal_error"), &json!("unknown")),
        "{told}"
    );
    assert_eq!(told["idempotency_key"], seen.lock().unwrap().as_str());
    assert!(!answer.text().contains("a bug"), "no innards");
    serving.abort();
}

#[tokio::test]
async fn a_gateway_that_stops_shows_what_it_has_of_a_timeline() {
    let id = "01933f3c-7d5a-7b60-9d6f-3f0b4b1f2a11";
    let of_orders = format!("GET /v1/orders/{id}/timeline");
    let gateway = Gateway::start(move |seen| match seen.line == of_orders {
        true => Does::Answers(ok(r#"{"steps":[],"pruned":false,"missing":["payments"]}"#)),
        false => Does::AnswersWhen(Arc::default()),
    })
    .await;
    let http = gateway.http.clone();
    let stopping = async {
        eventually("both are asked", SOON, async || {
            (gateway.behind.seen().len() == 2).then_some(())
        })
        .await;
        gateway.stop().await;
    };
    let path = format!("/v1/orders/{id}/timeline");
    let (answer, ()) = tokio::join!(http.get(&path), stopping);
    let answer = answer.unwrap();
    assert_eq!(
        (answer.status, &answer.json()["missing"]),
        (200, &json!(["payments"])),
        "{}",
        answer.text()
    );
}

#[tokio::test]
async fn a_gateway_that_stops_answers_whoever_it_has_let_in() {
    let gateway = Gateway::start(|seen| match seen.line.as_str() {
        "GET /v1/orders/7?wait=0" => Does::Answers(ok(r#"{"status":"NEW"}"#)),
        _ => Does::AnswersWhen(Arc::default()),
    })
    .await;
    let (http, behind) = (gateway.http.clone(), gateway.behind.clone());
    let body = json!({ "user_id": "a", "amount": 1 });
    let begun = Instant::now();
    let stopping = async {
        eventually("both are let in", SOON, async || {
            (behind.seen().len() == 2).then_some(())
        })
        .await;
        gateway.stop().await;
    };
    let ordering = http.post("/v1/orders?wait=30", Some("k"), &body);
    let (waits, orders, ()) = tokio::join!(http.get("/v1/orders/7?wait=30"), ordering, stopping);
    let (waits, orders) = (waits.unwrap(), orders.unwrap());
    assert_eq!(
        (waits.status, &waits.json()["status"]),
        (200, &json!("NEW")),
        "it is told how the order is now"
    );
    let told = orders.json();
    assert_eq!(
        (orders.status, &told["outcome"], &told["idempotency_key"]),
        (503, &json!("unknown"), &json!("k")),
        "{told}"
    );
    assert!(
        begun.elapsed() < Duration::from_secs(10),
        "{:?}",
        begun.elapsed()
    );
    let sent: Vec<String> = behind
        .seen()
        .into_iter()
        .map(|seen| seen.line)
        .filter(|line| line.starts_with("POST"))
        .collect();
    assert_eq!(
        sent,
        ["POST /v1/orders?wait=30"],
        "only who waits for an order is asked for again"
    );
}
