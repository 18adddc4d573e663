//! Serving HTTP/1.1 with limits: a client that is slow or greedy holds nothing for long.

use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::header::CONNECTION;
use axum::response::IntoResponse;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tower::Service as _;
use tracing::{debug, warn};

use crate::problem::{Code, Problem};

/// Open requests get this long after a shutdown begins.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);
/// Largest request line and headers together.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// Delay before the next accept if one fails, since no file descriptor is left.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(50);
/// A client that still sends when its connection ends gets this long to read the last response. Closing at once would
/// reset the connection, and the client would lose the response.
const LINGER_TIMEOUT: Duration = Duration::from_secs(1);
/// A connection above the limit gets this long to send the request that is rejected.
const REJECTED_HEAD_TIMEOUT: Duration = Duration::from_secs(1);

/// The address at the other end of the connection, in the extensions of each request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer(pub IpAddr);

#[derive(Clone, Copy, Debug)]
struct Limits {
    /// A request's head must be complete within this time, and a connection may be idle as long. Longer than our own
    /// clients keep idle connections, so that they close them and not the server.
    head_timeout: Duration,
    connections_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            head_timeout: Duration::from_secs(30),
            connections_max: 4096,
        }
    }
}

/// Serves until `shutdown`, then lets open requests end, for at most [`DRAIN_TIMEOUT`].
pub async fn serve(
    listener: TcpListener,
    router: Router,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    raise_open_files_limit();
    tokio::select! {
        () = serve_within(Limits::default(), listener, router, shutdown) => {}
        () = crate::metrics::upkeep() => {}
    }
    Ok(())
}

async fn serve_within(
    limits: Limits,
    listener: TcpListener,
    router: Router,
    shutdown: CancellationToken,
) {
    let permits = Arc::new(Semaphore::new(limits.connections_max));
    let rejecting = crate::http::layered(Router::new().fallback(too_many_connections));
    // A JoinSet and not a TaskTracker: connections that outlive the drain, or a dropped server, are aborted.
    let mut connections = JoinSet::new();
    while let Some(accepted) = shutdown.run_until_cancelled(listener.accept()).await {
        while connections.try_join_next().is_some() {}
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(error = %error, "A connection could not be accepted");
                shutdown
                    .run_until_cancelled(tokio::time::sleep(ACCEPT_RETRY_DELAY))
                    .await;
                continue;
            }
        };
        if let Err(error) = stream.set_nodelay(true) {
            debug!(error = %error, "TCP_NODELAY could not be set");
        }
        let (permit, router, head_timeout) = match permits.clone().try_acquire_owned() {
            Ok(permit) => (Some(permit), router.clone(), limits.head_timeout),
            Err(_) => (None, rejecting.clone(), REJECTED_HEAD_TIMEOUT),
        };
        let shutdown = shutdown.clone();
        connections.spawn(async move {
            serve_connection(head_timeout, stream, peer.ip(), router, shutdown).await;
            drop(permit);
        });
    }
    drop(listener);
    let drained = async { while connections.join_next().await.is_some() {} };
    if timeout(DRAIN_TIMEOUT, drained).await.is_err() {
        warn!("Some requests did not end within {DRAIN_TIMEOUT:?} and are aborted");
    }
}

async fn serve_connection(
    head_timeout: Duration,
    mut stream: TcpStream,
    peer: IpAddr,
    router: Router,
    shutdown: CancellationToken,
) {
    let service = service_fn(move |request: hyper::Request<Incoming>| {
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(Peer(peer));
        // A router is always ready.
        router.clone().call(request)
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(head_timeout)
        .max_header_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(&mut stream), service);
    let ended = {
        let mut connection = pin!(connection);
        tokio::select! {
            ended = connection.as_mut() => ended,
            () = shutdown.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        }
    };
    if let Err(error) = ended {
        debug!(error = %error, "A connection ended early");
    }
    let rest = async {
        let mut discarded = [0; 4096];
        while matches!(stream.read(&mut discarded).await, Ok(1..)) {}
    };
    // A client that sends longer loses the response.
    let _ = timeout(LINGER_TIMEOUT, rest).await;
}

/// A client is rejected at once rather than left waiting for a free connection.
async fn too_many_connections() -> impl IntoResponse {
    // One line for each connection would add to the load; they are counted.
    debug!("A connection is rejected: there are too many");
    crate::metrics::refused("connections");
    let problem = Problem::new(Code::Overloaded).because("There are too many connections.");
    ([(CONNECTION, "close")], problem)
}

/// Each request needs a file descriptor or two, and the usual soft limit of 1024 is soon reached. The hard limit is what
/// the administrator allows.
fn raise_open_files_limit() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum
        && let Err(error) = setrlimit(
            Resource::Nofile,
            Rlimit {
                current: maximum,
                maximum,
            },
        )
    {
        debug!(error = %error, "The limit of open files could not be raised");
    }
}

#[cfg(test)]
mod tests {
    use axum::routing::{get, post};
    use serde_json::Value;
    use tokio::io::AsyncWriteExt as _;

    use super::*;
    use crate::input::ValidatedJson;
    use crate::problem::CONTENT_TYPE;

    #[derive(serde::Deserialize)]
    struct Empty {}

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

        /// Sends bytes as they are and reads until the server closes the connection.
        async fn say(&self, bytes: &[u8]) -> String {
            let mut stream = TcpStream::connect(self.address).await.unwrap();
            // The server may refuse before it has read everything.
            let _ = stream.write_all(bytes).await;
            heard(&mut stream).await
        }
    }

    async fn heard(stream: &mut TcpStream) -> String {
        let mut answer = Vec::new();
        timeout(Duration::from_secs(20), stream.read_to_end(&mut answer))
            .await
            .unwrap()
            .unwrap();
        String::from_utf8(answer).unwrap()
    }

    /// Status and code of an answer, which must be a problem document with the request's id.
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
        let server = Server::start(Limits::default()).await;
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
            let answer = server.say(bytes.as_bytes()).await;
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
            let answer = server.say(bytes.as_bytes()).await;
            assert_eq!(
                problem(&answer),
                (status, code.to_owned()),
                "{}",
                &bytes[..bytes.len().min(80)]
            );
        }
        let answer = server.say(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
        assert!(
            answer.is_empty() || answer.starts_with("HTTP/1.1 400 "),
            "{answer:?}"
        );
        assert!(
            server
                .say(b"GET /hello HTTP/1.0\r\n\r\n")
                .await
                .ends_with("hello")
        );
    }

    #[tokio::test]
    async fn a_large_upload_is_refused_before_it_has_come_and_the_answer_arrives() {
        let server = Server::start(Limits::default()).await;
        let head = "POST /echo HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 3000000\r\n\r\n";
        let mut upload = head.as_bytes().to_vec();
        upload.resize(head.len() + 3_000_000, b' ');
        assert_eq!(
            problem(&server.say(&upload).await),
            (413, "body_too_large".to_owned())
        );
    }

    #[tokio::test]
    async fn a_slow_head_and_an_idle_connection_are_cut_off() {
        let server = Server::start(Limits {
            head_timeout: Duration::from_millis(50),
            ..Limits::default()
        })
        .await;
        assert_eq!(server.say(b"").await, "");
        assert_eq!(server.say(b"GET /hello HT").await, "");
        let answer = server.say(b"GET /hello HTTP/1.1\r\nhost: x\r\n\r\n").await;
        assert!(
            answer.starts_with("HTTP/1.1 200") && answer.ends_with("hello"),
            "kept open, then closed: {answer}"
        );
    }

    #[tokio::test]
    async fn one_connection_too_many_is_rejected_at_once() {
        let server = Server::start(Limits {
            connections_max: 1,
            ..Limits::default()
        })
        .await;
        let mut first = TcpStream::connect(server.address).await.unwrap();
        first
            .write_all(b"GET /hello HTTP/1.1\r\nhost: x\r\n\r\n")
            .await
            .unwrap();
        first.readable().await.unwrap();
        let answer = server.say(b"GET /hello HTTP/1.1\r\nhost: x\r\n\r\n").await;
        assert_eq!(problem(&answer), (503, "overloaded".to_owned()));
        assert!(answer.contains("retry-after: 1"), "{answer}");
        first.shutdown().await.unwrap();
        assert!(heard(&mut first).await.ends_with("hello"));
    }

    #[tokio::test]
    async fn a_shutdown_closes_idle_connections_and_ends() {
        let server = Server::start(Limits::default()).await;
        let mut idle = TcpStream::connect(server.address).await.unwrap();
        idle.write_all(b"GET /hello HTTP/1.1\r\nhost: x\r\n\r\n")
            .await
            .unwrap();
        idle.readable().await.unwrap();
        server.shutdown.cancel();
        assert!(heard(&mut idle).await.ends_with("hello"));
        drop(idle);
        timeout(Duration::from_secs(20), server.serving)
            .await
            .unwrap()
            .unwrap();
    }
}
