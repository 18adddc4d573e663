//! Serving HTTP/1.1 with limits: a client that is slow, greedy or speaks nonsense holds nothing for long, and is told what
//! is wrong in a problem document like everybody else.

use std::io;
use std::net::IpAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::StatusCode;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tower::Service as _;
use tracing::{debug, info, warn};

use crate::http::{HEAD_BYTES_MAX, REQUEST_ID, foreign};
use crate::problem::{self, Problem};

/// After a shutdown begins, open requests get this long.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);
/// The accept queue of the system is tried again after this long when it fails (no file descriptors are left).
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(50);
/// A client that was refused gets this long to take the answer. Closing at once would destroy it on its way, if the client
/// was still sending.
const LINGER_TIMEOUT: Duration = Duration::from_secs(1);

/// Who sent a request: the address at the other end of the connection. Stands in the request's extensions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer(pub IpAddr);

/// What one client, and all together, may take.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// A request's head must be complete within this time; a connection may be idle as long. Longer than our own clients
    /// keep idle connections, so that it is they who close them.
    head_timeout: Duration,
    /// Connections at once.
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

/// Serves until `shutdown`, then lets open requests end, for a bounded time.
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
    let places = Arc::new(Semaphore::new(limits.connections_max));
    // Ends all connections if this future is dropped.
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
            debug!(error = %error, "A connection goes on without TCP_NODELAY");
        }
        let Ok(place) = places.clone().try_acquire_owned() else {
            turn_away(&mut connections, stream);
            continue;
        };
        let (router, shutdown) = (router.clone(), shutdown.clone());
        connections.spawn(async move {
            converse(limits, stream, peer.ip(), router, shutdown).await;
            drop(place);
        });
    }
    drop(listener);
    let drained = async { while connections.join_next().await.is_some() {} };
    if timeout(DRAIN_TIMEOUT, drained).await.is_err() {
        warn!("Some requests did not end within {DRAIN_TIMEOUT:?} and are cut off");
    }
}

/// One connection, from its first request to its end.
async fn converse(
    limits: Limits,
    stream: TcpStream,
    peer: IpAddr,
    router: Router,
    shutdown: CancellationToken,
) {
    let mut wire = Wire {
        stream,
        refused: None,
        heard: false,
    };
    let service = service_fn(move |request: hyper::Request<Incoming>| {
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(Peer(peer));
        // A router is always ready.
        router.clone().call(request)
    });
    let ended = {
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(limits.head_timeout)
            .max_header_size(HEAD_BYTES_MAX)
            .serve_connection(TokioIo::new(&mut wire), service);
        let mut connection = pin!(connection);
        tokio::select! {
            ended = connection.as_mut() => ended,
            () = shutdown.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        }
    };
    let problem = match (&ended, wire.refused) {
        (_, Some(status)) => Some(foreign(status)),
        // In the middle of a request; a connection that was only idle is closed without a word.
        (Err(error), None) if error.is_timeout() && wire.heard => {
            let detail = format!(
                "The request's headers were not complete within {:?}. Send it again.",
                limits.head_timeout
            );
            Some(Problem::new(
                StatusCode::REQUEST_TIMEOUT,
                "request_timeout",
                detail,
            ))
        }
        _ => None,
    };
    if let Err(error) = ended {
        debug!(error = %error, "A connection ended early");
    }
    farewell(wire.stream, problem).await;
}

/// Says what is wrong, if anything is, and closes the connection so that the last answer arrives.
async fn farewell(mut stream: TcpStream, problem: Option<Problem>) {
    let lingering = async {
        if let Some(problem) = problem {
            stream.write_all(&answer(problem)).await?;
        }
        stream.shutdown().await?;
        let mut rest = [0; 4096];
        while stream.read(&mut rest).await? > 0 {}
        io::Result::Ok(())
    };
    // Whoever does not listen to the end has gone.
    let _ = timeout(LINGER_TIMEOUT, lingering).await;
}

/// A whole answer, for where there is no request to answer yet.
fn answer(problem: Problem) -> Vec<u8> {
    let status = problem.status();
    let retry_after = problem
        .retry_after_seconds()
        .map_or_else(String::new, |seconds| format!("retry-after: {seconds}\r\n"));
    let request_id = uuid::Uuid::now_v7().to_string();
    if !problem.sheds() {
        let code = problem.code();
        info!(
            request.id = request_id,
            http.status = status.as_u16(),
            problem.code = code,
            "Request answered with a problem"
        );
    }
    let document = serde_json::to_string(&problem.into_document(&request_id))
        .expect("a problem document is plain data");
    let (content_type, length) = (problem::CONTENT_TYPE, document.len());
    format!(
        "HTTP/1.1 {status}\r\nconnection: close\r\ncache-control: no-store\r\ncontent-type: {content_type}\r\n\
         content-length: {length}\r\n{retry_after}{REQUEST_ID}: {request_id}\r\n\r\n{document}"
    )
    .into_bytes()
}

/// Too many connections: said at once, rather than letting clients wait for a place.
fn turn_away(connections: &mut JoinSet<()>, stream: TcpStream) {
    // As many lines as connections would make it worse; they are counted.
    debug!("A connection is turned away: there are too many");
    crate::metrics::refused("connections");
    let detail = "There are too many connections. Try again soon.";
    let problem = Problem::overloaded(detail);
    connections.spawn(farewell(stream, Some(problem)));
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
        debug!(error = %error, "The limit of open files stays as it is");
    }
}

/// The connection as hyper sees it. What hyper refuses by itself (no HTTP, headers too large) it answers with a bare
/// status. Every answer of ours carries a request id, so an error without one is hyper's: it is held back here, and
/// [`converse`] writes the problem document instead.
struct Wire {
    stream: TcpStream,
    refused: Option<StatusCode>,
    /// Whether something was read since the last answer.
    heard: bool,
}

impl Wire {
    fn held_back(&mut self, bytes: &[u8]) -> bool {
        let status = bare_refusal(bytes);
        self.refused = self.refused.or(status);
        self.heard = false;
        status.is_some()
    }
}

fn bare_refusal(bytes: &[u8]) -> Option<StatusCode> {
    let head = std::str::from_utf8(bytes.strip_suffix(b"\r\n\r\n")?).ok()?;
    let status = head.strip_prefix("HTTP/1.1 ")?.get(..3)?;
    let bare = status.starts_with('4') && !head.contains(REQUEST_ID.as_str());
    bare.then(|| status.parse().ok())?
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        self.heard |= buf.filled().len() > before;
        read
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.held_back(bytes) {
            return Poll::Ready(Ok(bytes.len()));
        }
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if let [only] = parts
            && self.held_back(only)
        {
            return Poll::Ready(Ok(only.len()));
        }
        self.heard = false;
        Pin::new(&mut self.stream).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    /// Left to [`farewell`].
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use axum::routing::{get, post};
    use serde_json::Value;

    use super::*;
    use crate::body::Fields;

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
                .route("/echo", post(async |fields: Fields| fields.finish()));
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
        assert_eq!(header("content-type"), problem::CONTENT_TYPE, "{answer}");
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
    async fn what_is_no_http_is_answered_with_a_problem_document_too() {
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
        for (bytes, status, code) in [
            ("\u{16}\u{3}\u{1}garbage\r\n\r\n", 400, "bad_request"),
            ("GET /hello\r\n\r\n", 400, "bad_request"),
            ("GET /hello HTTP/9.9\r\n\r\n", 400, "bad_request"),
            (
                "GET /hello HTTP/1.1\r\nno colon\r\n\r\n",
                400,
                "bad_request",
            ),
            (
                "GET /hel\0lo HTTP/1.1\r\nhost: x\r\n\r\n",
                400,
                "bad_request",
            ),
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
            (&huge, 431, "headers_too_large"),
            (&many, 431, "headers_too_large"),
            (&long, 414, "url_too_long"),
            (&endless, 431, "headers_too_large"),
            (lengths, 400, "bad_request"),
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
        assert!(answer.is_empty() || problem(&answer).0 == 400, "{answer:?}");
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
    async fn a_slow_head_is_cut_off_with_a_word_and_an_idle_connection_without() {
        let server = Server::start(Limits {
            head_timeout: Duration::from_millis(50),
            ..Limits::default()
        })
        .await;
        assert_eq!(server.say(b"").await, "");
        assert_eq!(
            problem(&server.say(b"GET /hello HT").await),
            (408, "request_timeout".to_owned())
        );
        let answer = server.say(b"GET /hello HTTP/1.1\r\nhost: x\r\n\r\n").await;
        assert!(
            answer.starts_with("HTTP/1.1 200") && answer.ends_with("hello"),
            "kept open, then closed in silence: {answer}"
        );
    }

    #[tokio::test]
    async fn one_connection_too_many_is_told_so_at_once() {
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
