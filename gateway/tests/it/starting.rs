//! Errors at start, and the log of the process.

use std::process::{Command, Stdio};

use bytes::Bytes;
use stack::http::Http;
use stack::testing::eventually;

use crate::harness::{Reaction, SOON, Service};

#[test]
fn a_wrong_setting_is_reported_in_one_line_without_a_backtrace() {
    let output = Command::new(env!("CARGO_BIN_EXE_gateway"))
        .args([
            "--listen=127.0.0.1:0",
            "--orders-url=https://orders.example",
        ])
        .env("RUST_BACKTRACE", "1")
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(
        said,
        "Error: GOZON_ORDERS_URL: https://orders.example/ must look like http://host:port\n"
    );
    assert_eq!(output.status.code(), Some(1));
}

#[tokio::test]
async fn a_request_id_is_in_the_log_of_the_service_that_answered() {
    let payments = Service::start(|_| {
        let head =
            "HTTP/1.1 409 Conflict\r\ncontent-type: application/problem+json\r\ncontent-length: 2";
        Reaction::Answers(format!("{head}\r\n\r\n{{}}"))
    })
    .await;
    let [port, unused_port] = [(); 2].map(|()| stack::ports::free_port().unwrap());
    let mut process = Command::new(env!("CARGO_BIN_EXE_gateway"))
        .args([
            &format!("--listen=127.0.0.1:{port}"),
            &format!("--payments-url=http://{}", payments.address),
        ])
        .args([
            &format!("--orders-url=http://127.0.0.1:{unused_port}"),
            "--rate-per-user=1",
        ])
        .env("RUST_LOG", "info")
        .env_remove("NATS_PASSWORD")
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let http = Http::new(format!("http://127.0.0.1:{port}"));
    eventually("the gateway listens", SOON, async || {
        http.get("/livez").await.ok()
    })
    .await;
    let ask = async |method: &str, path: &str, id: &str| {
        http.request(method, path, &[("x-request-id", id)], Bytes::new())
            .await
            .unwrap()
            .status
    };
    let statuses = [
        ask("GET", "/nowhere", "id-404").await,
        ask("PUT", "/v1/orders", "id-405").await,
        ask("GET", "/v1/orders/events", "id-without-broker").await,
        ask("GET", "/v1/orders/7", "id-away").await,
        // The gateway does not log this one, because payments logs its own answers.
        ask("GET", "/v1/accounts/alice", "id-409").await,
    ];
    eventually("alice is rate limited", SOON, async || {
        (ask("GET", "/v1/accounts/alice", "id-429").await == 429).then_some(())
    })
    .await;
    process.kill().unwrap();
    assert_eq!(statuses, [404, 405, 503, 503, 409]);
    let log = String::from_utf8(process.wait_with_output().unwrap().stderr).unwrap();
    let lines = |id: &str| {
        log.lines()
            .filter(|line| line.contains(id))
            .collect::<Vec<_>>()
    };
    for (id, code) in [
        ("id-404", "not_found"),
        ("id-405", "method_not_allowed"),
        ("id-without-broker", "no_live_events"),
    ] {
        assert!(
            matches!(lines(id)[..], [line] if line.contains(" INFO ") && line.contains(code)),
            "{id}: {log}"
        );
    }
    assert!(
        matches!(lines("id-away")[..], [cause, answer] if cause.contains(" WARN ") && answer.contains(" INFO ")),
        "{log}"
    );
    // Rejected requests are not logged: one line per request would add to the load.
    assert!(
        lines("id-409").is_empty() && lines("id-429").is_empty(),
        "{log}"
    );
}
