use std::pin::Pin;
use std::task::{Context, Poll};

use axum::routing::{get, post};
use bytes::Bytes;
use serde_json::Value;
use tokio::io::AsyncWriteExt as _;

use super::*;
use crate::input::ValidatedJson;
use crate::problem::CONTENT_TYPE;

const LIMITS: Limits = Limits {
    head_timeout: Duration::from_secs(30),
    unread_timeout: Duration::from_secs(20),
    connections_max: 1024,
};

#[derive(serde::Deserialize)]
struct Empty {}

/// Notified when a response of `/endless` is dropped.
static ENDED: tokio::sync::Notify = tokio::sync::Notify::const_new();

struct Endless;

impl futures_util::Stream for Endless {
    type Item = Result<Bytes, std::convert::Infallible>;

    fn poll_next(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Poll::Ready(Some(Ok(Bytes::from_static(&[b'x'; 1024]))))
    }
}

impl Drop for Endless {
    fn drop(&mut self) {
        ENDED.notify_one();
    }
}

struct Server {
    address: std::net::SocketAddr,
    shutdown: CancellationToken,
    serving: tokio::task::JoinHandle<()>,
}

impl Server {
    async fn start(limits: Limits) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let router = Router::new()
            .route("/hello", get(async || "hello"))
            .route("/endless", get(async || Body::from_stream(Endless)))
            .merge(crate::health::Health::default().routes(shutdown.clone()))
            .route("/echo", post(async |_: ValidatedJson<Empty>| "ok"));
        let serving = tokio::spawn(serve_within(
            limits,
            listener,
            crate::http::edge(router),
            shutdown.clone(),
        ));
        Self {
            address,
            shutdown,
            serving,
        }
    }

    /// Sends raw bytes, and reads until the server closes the connection.
    async fn send_raw(&self, bytes: &[u8]) -> String {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        // The server may reject the request before it has read all of it.
        let _ = stream.write_all(bytes).await;
        read_to_end(&mut stream).await
    }
}

async fn read_to_end(stream: &mut TcpStream) -> String {
    let mut answer = Vec::new();
    timeout(Duration::from_secs(20), stream.read_to_end(&mut answer))
        .await
        .unwrap()
        .unwrap();
    String::from_utf8(answer).unwrap()
}

/// Status and code of an answer. Asserts that it is a problem document with the request id.
fn problem(answer: &str) -> (u16, String) {
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .unwrap_or_else(|| panic!("no answer: {answer:?}"));
    let document: Value =
        serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {answer:?}"));
    let header = |name: &str| {
        head.lines()
            .find_map(|line| line.strip_prefix(&format!("{name}: ")))
            .unwrap_or_default()
    };
    assert_eq!(header("content-type"), CONTENT_TYPE, "{answer}");
    assert_eq!(header("content-length"), body.len().to_string(), "{answer}");
    assert!(
        !header("x-request-id").is_empty() && document["request_id"] == header("x-request-id"),
        "{answer}"
    );
    let status: u16 = head[9..12].parse().unwrap();
    assert_eq!(document["status"], status, "{answer}");
    (status, document["code"].as_str().unwrap().to_owned())
}

#[tokio::test]
async fn http_that_cannot_be_parsed_gets_a_bare_status_and_the_rest_a_problem_document() {
    let server = Server::start(LIMITS).await;
    let huge = format!(
        "GET /hello HTTP/1.1\r\nhost: x\r\ncookie: {}\r\n\r\n",
        "x".repeat(HEAD_BYTES_MAX)
    );
    let many = format!(
        "GET /hello HTTP/1.1\r\nhost: x\r\n{}\r\n",
        "a: b\r\n".repeat(200)
    );
    let long = format!(
        "GET /hello?{} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
        "x".repeat(5000)
    );
    let endless = format!(
        "GET /hello?{} HTTP/1.1\r\nhost: x\r\n\r\n",
        "x".repeat(100_000)
    );
    let lengths = "POST /echo HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
                   content-length: 2\r\ncontent-length: 3\r\n\r\n{}";
    let chunk = "POST /echo HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n\
                 transfer-encoding: chunked\r\n\r\nZZ\r\n{}\r\n0\r\n\r\n";
    for (bytes, status) in [
        ("\u{16}\u{3}\u{1}garbage\r\n\r\n", 400),
        ("GET /hello\r\n\r\n", 400),
        ("GET /hello HTTP/9.9\r\n\r\n", 400),
        ("GET /hello HTTP/1.1\r\nno colon\r\n\r\n", 400),
        ("GET /hel\0lo HTTP/1.1\r\nhost: x\r\n\r\n", 400),
        (&huge, 431),
        (&many, 431),
        (&endless, 431),
        (lengths, 400),
    ] {
        let answer = server.send_raw(bytes.as_bytes()).await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")) && answer.ends_with("\r\n\r\n"),
            "{}: {answer}",
            &bytes[..bytes.len().min(80)]
        );
    }
    for (bytes, status, code) in [
        (
            "GET /nowhere HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
            404,
            "not_found",
        ),
        (
            "GET /../etc/passwd HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
            404,
            "not_found",
        ),
        (
            "OPTIONS * HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
            404,
            "not_found",
        ),
        (
            "BREW /hello HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
            405,
            "method_not_allowed",
        ),
        (&long, 414, "url_too_long"),
        (chunk, 400, "unreadable_body"),
    ] {
        let answer = server.send_raw(bytes.as_bytes()).await;
        assert_eq!(
            problem(&answer),
            (status, code.to_owned()),
            "{}",
            &bytes[..bytes.len().min(80)]
        );
    }
    let answer = server.send_raw(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
    assert!(
        answer.is_empty() || answer.starts_with("HTTP/1.1 400 "),
        "{answer:?}"
    );
    assert!(
        server
            .send_raw(b"GET /hello HTTP/1.0\r\n\r\n")
            .await
            .ends_with("hello")
    );
}

#[tokio::test]
async fn a_large_upload_is_rejected_before_it_is_read_and_the_client_gets_the_answer() {
    let server = Server::start(LIMITS).await;
    let head = "POST /echo HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 3000000\r\n\r\n";
    let mut upload = head.as_bytes().to_vec();
    upload.resize(head.len() + 3_000_000, b' ');
    assert_eq!(
        problem(&server.send_raw(&upload).await),
        (413, "body_too_large".to_owned())
    );
}

#[tokio::test]
async fn connections_with_a_slow_head_or_idle_ones_are_closed() {
    let server = Server::start(Limits {
        head_timeout: Duration::from_millis(50),
        ..LIMITS
    })
    .await;
    assert_eq!(server.send_raw(b"").await, "");
    assert_eq!(server.send_raw(b"GET /hello HT").await, "");
    let answer = server
        .send_raw(b"GET /hello HTTP/1.1\r\nhost: x\r\n\r\n")
        .await;
    assert!(
        answer.starts_with("HTTP/1.1 200") && answer.ends_with("hello"),
        "the connection is kept open, then closed: {answer}"
    );
}

#[tokio::test]
async fn a_connection_above_the_limit_is_rejected_at_once() {
    let server = Server::start(Limits {
        connections_max: 1,
        ..LIMITS
    })
    .await;
    let mut first = TcpStream::connect(server.address).await.unwrap();
    first
        .write_all(b"GET /hello HTTP/1.1\r\nhost: x\r\n\r\n")
        .await
        .unwrap();
    first.readable().await.unwrap();
    let answer = server
        .send_raw(b"GET /hello HTTP/1.1\r\nhost: x\r\n\r\n")
        .await;
    assert_eq!(problem(&answer), (503, "overloaded".to_owned()));
    assert!(answer.contains("retry-after: 1"), "{answer}");
    first.shutdown().await.unwrap();
    assert!(read_to_end(&mut first).await.ends_with("hello"));
}

#[tokio::test]
async fn a_shutdown_closes_idle_connections_and_ends() {
    let server = Server::start(LIMITS).await;
    let mut idle = TcpStream::connect(server.address).await.unwrap();
    idle.write_all(b"GET /hello HTTP/1.1\r\nhost: x\r\n\r\n")
        .await
        .unwrap();
    idle.readable().await.unwrap();
    server.shutdown.cancel();
    assert!(read_to_end(&mut idle).await.ends_with("hello"));
    drop(idle);
    timeout(Duration::from_secs(20), server.serving)
        .await
        .unwrap()
        .unwrap();
}

/// Connects from the address `source` and sends this request.
async fn client(source: &str, server: &Server, request: &[u8]) -> TcpStream {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    // So small that a large response does not fit.
    socket.set_recv_buffer_size(4096).unwrap();
    let source = std::net::SocketAddr::new(source.parse().unwrap(), 0);
    socket.bind(source).unwrap();
    let mut stream = socket.connect(server.address).await.unwrap();
    stream.write_all(request).await.unwrap();
    stream
}

#[tokio::test]
async fn one_address_leaves_a_quarter_of_the_connections_to_others_and_probes_always_work() {
    let server = Server::start(Limits {
        connections_max: 8,
        ..LIMITS
    })
    .await;
    let hello = b"GET /hello HTTP/1.1\r\nhost: x\r\n\r\n";
    let mut open = Vec::new();
    for (source, status) in [("127.0.0.2", "200"); 6]
        .into_iter()
        .chain([("127.0.0.2", "503"); 3])
        .chain([("127.0.0.1", "200"); 2])
        .chain([("127.0.0.1", "503")])
    {
        let mut stream = client(source, &server, hello).await;
        let mut line = [0; 12];
        stream.read_exact(&mut line).await.unwrap();
        assert_eq!(&line[9..], status.as_bytes(), "from {source}");
        open.push(stream);
    }
    for probe in ["/livez", "/readyz"] {
        let probe = format!("GET {probe} HTTP/1.1\r\nhost: x\r\n\r\n");
        let answer = server.send_raw(probe.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        assert!(answer.contains("connection: close\r\n"), "{answer}");
    }
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_client_that_reads_nothing_is_disconnected() {
    let server = Server::start(Limits {
        unread_timeout: Duration::from_millis(500),
        ..LIMITS
    })
    .await;
    let unread = client(
        "127.0.0.1",
        &server,
        b"GET /endless HTTP/1.1\r\nhost: x\r\n\r\n",
    )
    .await;
    // The server drops the response when it closes the connection.
    let ended = timeout(Duration::from_secs(20), ENDED.notified()).await;
    assert!(ended.is_ok(), "the client is still connected");
    drop(unread);
}

#[test]
fn an_ipv6_network_is_one_client() {
    let network = |address: &str| client_network(address.parse().unwrap()).to_string();
    assert_eq!(network("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
    assert_eq!(network("::ffff:10.0.0.7"), "10.0.0.7");
    assert_eq!(network("10.0.0.7"), "10.0.0.7");
}
