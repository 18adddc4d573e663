//! Malformed and unusual HTTP. The limits of the server itself are tested in service-kit.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::harness::{Gateway, Reaction, SOON, ok, problem};

#[tokio::test]
async fn a_malformed_request_is_rejected_and_not_forwarded() {
    let gateway = Gateway::start(|_| Reaction::Answers(ok("{}"))).await;
    let head = "Host: x\r\nContent-Type: application/json\r\nConnection: close\r\n";
    let large = format!(
        "POST /v1/orders HTTP/1.1\r\n{head}Content-Length: 20000\r\n\r\n{}",
        "x".repeat(20_000)
    );
    for (bytes, status) in [
        ("\u{16}\u{3}\u{1}TLS to a plain port\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nbroken\r\n\r\n", 400),
        (
            &format!(
                "POST /v1/orders HTTP/1.1\r\n{head}Content-Length: 2\r\nContent-Length: 4\r\n\r\n{{}}xx"
            ),
            400,
        ),
        (
            &format!("POST /v1/orders HTTP/1.1\r\n{head}Content-Length: -1\r\n\r\n{{}}"),
            400,
        ),
        (
            &format!(
                "POST /v1/orders HTTP/1.1\r\n{head}Transfer-Encoding: chunked\r\n\r\nnot a length\r\n"
            ),
            400,
        ),
        (
            &format!("POST /v1/orders HTTP/1.1\r\n{head}Transfer-Encoding: gzip\r\n\r\n{{}}"),
            400,
        ),
        (
            &format!(
                "POST /v1/orders HTTP/1.1\r\n{head}Idempotency-Key: a\r\nIdempotency-Key: b\r\nContent-Length: 2\r\n\r\n{{}}"
            ),
            400,
        ),
        (&large, 413),
        (
            &format!("GET /v1/orders?{} HTTP/1.1\r\n{head}\r\n", "x".repeat(5000)),
            414,
        ),
        (
            &format!(
                "GET /v1/orders HTTP/1.1\r\n{head}X: {}\r\n\r\n",
                "x".repeat(20_000)
            ),
            431,
        ),
        (
            &format!("GET /v1/orders/../../readyz HTTP/1.1\r\n{head}\r\n"),
            404,
        ),
        (
            &format!("GET /v1/../../../etc/passwd HTTP/1.1\r\n{head}\r\n"),
            404,
        ),
        (
            &format!("GET /swagger/../../etc/passwd HTTP/1.1\r\n{head}\r\n"),
            404,
        ),
        (&format!("CONNECT orders:8081 HTTP/1.1\r\n{head}\r\n"), 404),
        (&format!("TRACE /v1/orders HTTP/1.1\r\n{head}\r\n"), 405),
    ] {
        let answer = gateway.send_raw(bytes).await;
        let what = &bytes[..bytes.len().min(120)];
        // HTTP that cannot be parsed gets a bare status; the rest gets a problem document.
        match answer.strip_suffix("\r\n\r\n") {
            Some(head) => assert!(
                head.starts_with(&format!("HTTP/1.1 {status} ")) && matches!(status, 400 | 431),
                "{what}: {answer}"
            ),
            None => assert_eq!(problem(&answer).0, status, "{what}: {answer}"),
        }
    }
    assert_eq!(gateway.backend.requests().len(), 0);
}

#[tokio::test]
async fn unusual_but_valid_http_is_forwarded_as_one_plain_request() {
    let gateway = Gateway::start(|_| Reaction::Answers(ok("{}"))).await;
    for bytes in [
        "GET http://evil.example/v1/orders?a=b HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n",
        "GET /v1/orders?a=b HTTP/1.0\r\n\r\n",
    ] {
        assert!(
            gateway.send_raw(bytes).await.contains(" 200 OK\r\n"),
            "{bytes}"
        );
    }
    // A length in addition to chunks is used for request smuggling: the forwarded request has one
    // length, set by the gateway.
    let smuggled = "POST /v1/orders HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: 5\r\n\
                    Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n";
    let answer = gateway.send_raw(smuggled).await;
    let seen = gateway.backend.requests();
    assert!(
        seen[..2]
            .iter()
            .all(|request| request.line == "GET /v1/orders?a=b"),
        "{seen:?}"
    );
    if let Some(handed_on) = seen.get(2) {
        assert_eq!(
            (handed_on.body.as_str(), handed_on.header("content-length")),
            ("{}", Some("2"))
        );
        assert_eq!(handed_on.header("transfer-encoding"), None);
    } else {
        assert_eq!(problem(&answer).0, 400);
    }
}

#[tokio::test]
async fn a_request_with_a_slow_body_times_out() {
    let gateway = Gateway::start(|_| Reaction::Answers(ok("{}"))).await;
    let mut stream = TcpStream::connect(gateway.address).await.unwrap();
    let head = "POST /v1/orders HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let (mut reading, mut writing) = stream.into_split();
    let drip = async {
        // Sending a few bytes now and then does not keep the request open.
        while writing.write_all(b" ").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        std::future::pending::<()>().await;
    };
    let mut answer = String::new();
    tokio::select! {
        read = tokio::time::timeout(SOON, reading.read_to_string(&mut answer)) => { read.unwrap().unwrap(); }
        () = drip => {}
    }
    assert_eq!(problem(&answer), (408, "request_timeout".to_owned()));
    assert_eq!(gateway.backend.requests().len(), 0);
}
