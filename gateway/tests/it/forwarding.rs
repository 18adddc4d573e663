//! What the gateway forwards, and what it answers when a service is unavailable.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use bytes::Bytes;
use serde_json::json;
use service_kit::server::ConnectionArgs;
use stack::http::Http;
use stack::testing::{InProcessService, eventually};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use crate::harness::{Gateway, Reaction, SOON, ok};

#[tokio::test]
async fn only_known_headers_are_forwarded_in_both_directions() {
    let gateway = Gateway::start(|_| {
        Reaction::Answers(
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\nset-cookie: a=b\r\nserver: innards/1.0\r\n\
             x-internal: secret\r\nkeep-alive: timeout=9\r\nidempotency-replayed: true\r\nlocation: /v1/orders/7\r\n\r\n{}"
                .to_owned(),
        )
    })
    .await;
    let traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let answer = gateway
        .send_raw(&format!(
            "POST /v1/orders?a=%20b HTTP/1.1\r\nHost: evil.example\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\
             Content-Encoding: gzip\r\nConnection: close, X-Secret\r\nX-Secret: 1\r\nKeep-Alive: timeout=5\r\nTE: trailers\r\nUpgrade: h2c\r\n\
             Proxy-Authorization: Basic eA==\r\nCookie: session=1\r\nAuthorization: Bearer x\r\nX-Forwarded-For: 6.6.6.6\r\n\
             X-User-Id: root\r\nIdempotency-Key: k\r\nX-Request-Id: find-me\r\ntraceparent: {traceparent}\r\ntracestate: a=1\r\n\r\n{{}}"
        ))
        .await;
    let seen = gateway.backend.requests().remove(0);
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
        Some(gateway.backend.address.to_string().as_str())
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
async fn the_body_of_a_get_and_unknown_paths_are_not_forwarded() {
    let gateway = Gateway::start(|_| Reaction::Answers(ok("{}"))).await;
    let answer = gateway
        .http
        .request("GET", "/v1/orders", &[], Bytes::from_static(b"surprise"))
        .await
        .unwrap();
    assert_eq!(
        (answer.status, gateway.backend.requests()[0].body.as_str()),
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
    assert_eq!(gateway.backend.requests().len(), 1);
}

#[tokio::test]
async fn a_head_is_answered_like_a_get_without_its_body() {
    let id = "01933f3c-7d5a-7b60-9d6f-3f0b4b1f2a11";
    let gateway = Gateway::start(|_| {
        Reaction::Answers(ok(r#"{"steps":[],"items":[],"missing":[],"pruned":false}"#))
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
        // Counters change between the two requests, so the length may differ by a digit.
        if path != "/metrics" {
            assert!(
                length.is_none() || length == get.header("content-length"),
                "{path}: {length:?}, but {get:?}"
            );
        }
    }
    assert!(
        gateway
            .backend
            .requests()
            .iter()
            .all(|seen| seen.line.starts_with("GET ")),
        "the services get the same requests"
    );
}

/// One request id and one trace connect the logs of all services.
#[tokio::test]
async fn forwarded_requests_carry_the_request_id_and_the_trace() {
    let id = "01933f3c-7d5a-7b60-9d6f-3f0b4b1f2a11";
    let gateway = Gateway::start(|_| {
        Reaction::Answers(ok(r#"{"steps":[],"items":[],"missing":[],"pruned":false}"#))
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
        let before = gateway.backend.requests().len();
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
        let seen = gateway.backend.requests().split_off(before);
        assert_eq!(seen.len(), asked, "{path}");
        for seen in seen {
            let body = (
                seen.header("x-request-id"),
                seen.header("traceparent"),
                seen.header("cookie"),
            );
            assert_eq!(
                body,
                (Some("find-me"), Some(traceparent), None),
                "{path}: {}",
                seen.line
            );
        }
    }
}

#[tokio::test]
async fn an_event_stream_carries_its_trace_too() {
    let nats = format!(
        "--nats-url=nats://127.0.0.1:{}",
        stack::ports::free_port().unwrap()
    );
    let gateway = Gateway::start_with(&["--nats-password=x", &nats], |_| {
        Reaction::Answers(ok("{}"))
    })
    .await;
    let traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let request = format!(
        "GET /v1/orders/01933f3c-7d5a-7b60-9d6f-3f0b4b1f2a11/events HTTP/1.1\r\nHost: x\r\nX-Request-Id: find-me\r\n\
         traceparent: {traceparent}\r\n\r\n"
    );
    let mut follower = TcpStream::connect(gateway.address).await.unwrap();
    follower.write_all(request.as_bytes()).await.unwrap();
    let seen = eventually("the gateway has read the order", SOON, async || {
        gateway.backend.requests().pop()
    })
    .await;
    assert_eq!(
        (seen.header("x-request-id"), seen.header("traceparent")),
        (Some("find-me"), Some(traceparent))
    );
}

#[tokio::test]
async fn an_unavailable_service_is_named_with_what_to_do() {
    let gateway = Gateway::start(|_| {
        Reaction::AnswersThenCloses("HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{".to_owned())
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
            let before = gateway.backend.requests().len();
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
            let seen = gateway.backend.requests();
            assert_eq!(
                seen.len(),
                before + 1,
                "a request whose outcome is unknown is not retried"
            );
            let sent = seen[before].header("idempotency-key").unwrap();
            assert_eq!(
                document["idempotency_key"], sent,
                "the key that was sent, from the client or from the gateway"
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

/// Starts a gateway whose orders service has this address, without the backend of
/// [`Gateway::start`].
async fn gateway_for(orders: &str) -> (InProcessService, Http) {
    let config = [
        "gateway",
        "--listen=127.0.0.1:0",
        &format!("--orders-url=http://{orders}"),
    ];
    let config = <gateway::Config as clap::Parser>::try_parse_from(config).unwrap();
    let gateway = InProcessService::start(async move |address, shutdown| {
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
async fn a_request_to_an_unreachable_service_has_no_effect() {
    let free = stack::ports::free_port().unwrap();
    let (gateway, http) = gateway_for(&format!("127.0.0.1:{free}")).await;
    let answer = http.post("/v1/orders", None, &json!({})).await.unwrap();
    assert_eq!(
        (answer.status, answer.header("retry-after")),
        (503, Some("1"))
    );
    assert_eq!(
        answer.json()["detail"],
        "Orders Service temporarily unavailable. Wait as long as Retry-After says, then send the \
         request again with the same Idempotency-Key."
    );
    assert_eq!(
        (&answer.json()["outcome"], &answer.json()["idempotency_key"]),
        (&json!(null), &json!(null))
    );
    assert_eq!(
        http.get("/readyz").await.unwrap().status,
        200,
        "the gateway's health does not depend on other services"
    );
    gateway.stop().await.unwrap();
}

#[tokio::test]
async fn connections_are_reused_and_a_closed_one_causes_no_error() {
    let gateway = Gateway::start(|_| Reaction::AnswersThenCloses(ok("{}"))).await;
    for number in 0..20 {
        let answer = gateway
            .http
            .post("/v1/orders", None, &json!({}))
            .await
            .unwrap();
        assert_eq!(answer.status, 200, "{number}: {}", answer.text());
    }
    assert_eq!(
        gateway.backend.requests().len(),
        20,
        "each request was sent once"
    );
}

#[tokio::test]
async fn an_invalid_or_too_large_answer_is_not_forwarded() {
    let huge = ok(&"x".repeat(2 * 1024 * 1024));
    let gateway = Gateway::start(move |seen| {
        Reaction::AnswersThenCloses(match seen.line.as_str() {
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
        assert!(!answer.text().contains("SSH"), "internals leak");
    }
}

/// The backend has the same outer layers as the real services, and a handler that panics.
#[tokio::test]
async fn the_answer_after_a_panic_contains_the_key_made_by_the_gateway() {
    let seen = Arc::new(Mutex::new(String::new()));
    let keys = seen.clone();
    let panics = async move |headers: HeaderMap| -> StatusCode {
        *keys.lock().unwrap() = headers["idempotency-key"].to_str().unwrap().to_owned();
        panic!("a bug")
    };
    let router = service_kit::http::edge(Router::new().route("/v1/orders", post(panics)));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (_gateway, http) = gateway_for(&listener.local_addr().unwrap().to_string()).await;
    let serving = tokio::spawn(service_kit::server::serve(
        listener,
        router,
        ConnectionArgs::default(),
        CancellationToken::new(),
    ));
    let answer = http
        .post("/v1/orders", None, &json!({ "user_id": "a", "amount": 1 }))
        .await
        .unwrap();
    let body = answer.json();
    assert_eq!(
        (answer.status, &body["code"], &body["outcome"]),
        (500, &json!("internal_error"), &json!("unknown")),
        "{body}"
    );
    assert_eq!(body["idempotency_key"], seen.lock().unwrap().as_str());
    assert!(!answer.text().contains("a bug"), "internals leak");
    serving.abort();
}

#[tokio::test]
async fn a_stopping_gateway_returns_the_available_part_of_a_timeline() {
    let id = "01933f3c-7d5a-7b60-9d6f-3f0b4b1f2a11";
    let of_orders = format!("GET /v1/orders/{id}/timeline");
    let gateway = Gateway::start(move |seen| match seen.line == of_orders {
        true => Reaction::Answers(ok(r#"{"steps":[],"pruned":false,"missing":["payments"]}"#)),
        false => Reaction::AnswersWhen(Arc::default()),
    })
    .await;
    let http = gateway.http.clone();
    let stopping = async {
        eventually("both services have the request", SOON, async || {
            (gateway.backend.requests().len() == 2).then_some(())
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
async fn a_stopping_gateway_answers_all_accepted_requests() {
    let gateway = Gateway::start(|seen| match seen.line.as_str() {
        "GET /v1/orders/7?wait=0" => Reaction::Answers(ok(r#"{"status":"NEW"}"#)),
        _ => Reaction::AnswersWhen(Arc::default()),
    })
    .await;
    let (http, backend) = (gateway.http.clone(), gateway.backend.clone());
    let body = json!({ "user_id": "a", "amount": 1 });
    let begun = Instant::now();
    let stopping = async {
        eventually("both requests are accepted", SOON, async || {
            (backend.requests().len() == 2).then_some(())
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
        "the answer has the current state of the order"
    );
    let body = orders.json();
    assert_eq!(
        (orders.status, &body["outcome"], &body["idempotency_key"]),
        (503, &json!("unknown"), &json!("k")),
        "{body}"
    );
    assert!(
        begun.elapsed() < Duration::from_secs(10),
        "{:?}",
        begun.elapsed()
    );
    let sent: Vec<String> = backend
        .requests()
        .into_iter()
        .map(|seen| seen.line)
        .filter(|line| line.starts_with("POST"))
        .collect();
    assert_eq!(
        sent,
        ["POST /v1/orders?wait=30"],
        "only requests that wait for an order are sent to the service again"
    );
}
