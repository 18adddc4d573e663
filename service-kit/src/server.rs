//! An HTTP/1.1 server with limits on time, size and connections, so that slow or greedy clients
//! cannot exhaust its resources.

use std::net::{IpAddr, Ipv6Addr};
use std::pin::pin;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::response::IntoResponse;
use axum::routing::any;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tower::{Service as _, ServiceExt as _};
use tracing::{debug, warn};

use crate::problem::{Code, Problem};
use crate::slots::{CONNECTIONS, Slot, Slots};

/// Time for requests in progress after a shutdown begins.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum size of the request line and headers together.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// Delay after a failed accept. Usually no file descriptor is left.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(50);
/// Time for a client that is still sending to read the last response before the connection is
/// closed. Closing at once would reset the connection, and the client would lose the response.
const LINGER_TIMEOUT: Duration = Duration::from_secs(1);
/// Time for a connection above the limit to send the request that is then rejected.
const REJECTED_HEAD_TIMEOUT: Duration = Duration::from_secs(1);
/// Number of connections above the limit that may wait for their rejection. Further connections are
/// closed without a response.
const REJECTED_MAX: usize = 1024;

/// The client address of the connection. Each request has it in its extensions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer(pub IpAddr);

/// The part of an address that identifies a client: an IPv6 client usually has a whole /64 network.
pub fn client_network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        v4 @ IpAddr::V4(_) => v4,
    }
}

#[derive(Clone, Copy, Debug, clap::Args)]
pub struct ConnectionArgs {
    /// Maximum number of open HTTP connections; further ones get 503. One address can open at most
    /// three quarters of them. A gateway opens up to GOZON_REQUESTS_MAX connections to each
    /// service, and up to GOZON_WAITS_MAX more to orders.
    #[arg(long, env = "GOZON_CONNECTIONS_MAX", default_value_t = ConnectionArgs::default().connections_max)]
    pub connections_max: usize,
}

impl Default for ConnectionArgs {
    fn default() -> Self {
        Self {
            connections_max: 8192,
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Limits {
    /// Time for the head of a request, and maximum idle time of a connection. Our own clients close
    /// idle connections earlier, so the server never closes a connection that they are about to
    /// use.
    head_timeout: Duration,
    /// A client that reads nothing for this long is disconnected.
    unread_timeout: Duration,
    connections_max: usize,
}

impl Limits {
    fn new(arguments: ConnectionArgs) -> Self {
        Self {
            head_timeout: Duration::from_secs(30),
            unread_timeout: Duration::from_secs(20),
            connections_max: arguments.connections_max,
        }
    }
}

/// Serves until `shutdown`. Then waits for requests in progress, for at most [`DRAIN_TIMEOUT`].
pub async fn serve(
    listener: TcpListener,
    router: Router,
    connections: ConnectionArgs,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    raise_open_files_limit(connections.connections_max);
    tokio::select! {
        () = serve_within(Limits::new(connections), listener, router, shutdown) => {}
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
    let admission = Admission::new(limits, router);
    // A JoinSet, not a TaskTracker: connections are aborted when the drain times out or the server
    // is dropped.
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
        if let Err(error) = set_options(&stream, limits.unread_timeout) {
            debug!(error = %error, "The options of a connection could not be set");
        }
        if let Some(admitted) = admission.admit(peer.ip()) {
            let shutdown = shutdown.clone();
            connections.spawn(serve_connection(stream, peer.ip(), admitted, shutdown));
        }
    }
    drop(listener);
    let drained = async { while connections.join_next().await.is_some() {} };
    if timeout(DRAIN_TIMEOUT, drained).await.is_err() {
        warn!("Some requests were aborted: they did not end within {DRAIN_TIMEOUT:?}");
    }
}

/// Decides whether a new connection is served or rejected.
struct Admission {
    slots: Slots<IpAddr>,
    head_timeout: Duration,
    router: Router,
    rejected_slots: Slots<IpAddr>,
    rejecting: Router,
}

struct Admitted {
    /// Held while the connection is open.
    _slot: Slot<IpAddr>,
    head_timeout: Duration,
    keep_alive: bool,
    router: Router,
}

impl Admission {
    fn new(limits: Limits, router: Router) -> Self {
        // Probes are served above the limit too. Otherwise clients with too many connections would
        // make this process look dead.
        let served = router.clone();
        let probe = any(move |request: Request| served.clone().oneshot(request));
        let rejecting = Router::new()
            .route("/livez", probe.clone())
            .route("/readyz", probe)
            .fallback_service(crate::http::layered(
                Router::new().fallback(too_many_connections),
            ));
        Self {
            slots: Slots::new(CONNECTIONS, limits.connections_max),
            head_timeout: limits.head_timeout,
            router,
            rejected_slots: Slots::new(CONNECTIONS, REJECTED_MAX),
            rejecting,
        }
    }

    /// `None` if the connection must be closed at once.
    fn admit(&self, peer: IpAddr) -> Option<Admitted> {
        let client = client_network(peer);
        match self.slots.take(client) {
            Ok(slot) => Some(Admitted {
                _slot: slot,
                head_timeout: self.head_timeout,
                keep_alive: true,
                router: self.router.clone(),
            }),
            Err(refusal) => {
                crate::metrics::refused(refusal.reason());
                let slot = self.rejected_slots.take(client).ok()?;
                Some(Admitted {
                    _slot: slot,
                    head_timeout: REJECTED_HEAD_TIMEOUT,
                    keep_alive: false,
                    router: self.rejecting.clone(),
                })
            }
        }
    }
}

fn set_options(stream: &TcpStream, unread_timeout: Duration) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    // The time runs from the last byte that the client took, even while our own buffers have room.
    // Other systems lack this option: there a client that reads nothing keeps its connection.
    #[cfg(target_os = "linux")]
    rustix::net::sockopt::set_tcp_user_timeout(stream, unread_timeout.as_millis() as u32)?;
    Ok(())
}

async fn serve_connection(
    mut stream: TcpStream,
    peer: IpAddr,
    admitted: Admitted,
    shutdown: CancellationToken,
) {
    let Admitted {
        _slot,
        head_timeout,
        keep_alive,
        router,
    } = admitted;
    let service = service_fn(move |request: hyper::Request<Incoming>| {
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(Peer(peer));
        // A router is always ready.
        router.clone().call(request)
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .keep_alive(keep_alive)
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
        debug!(error = %error, "A connection ended with an error");
    }
    let rest = async {
        let mut discarded = [0; 4096];
        while matches!(stream.read(&mut discarded).await, Ok(1..)) {}
    };
    // If the client sends for longer than this, it loses the response.
    let _ = timeout(LINGER_TIMEOUT, rest).await;
}

/// Rejects the request at once, instead of letting the client wait for a free connection.
async fn too_many_connections() -> impl IntoResponse {
    // Not at level info: a log line per rejection would add to the load. A metric counts them.
    debug!("A connection was rejected: there are too many");
    Problem::new(Code::Overloaded).because("There are too many connections.")
}

/// Raises the soft limit, usually 1024, to the hard limit set by the administrator.
fn raise_open_files_limit(connections_max: usize) {
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
    // Two per client: its connection, and the connection to the service behind the gateway.
    let needed = 2 * connections_max as u64;
    if let Some(allowed) = maximum.filter(|allowed| *allowed < needed) {
        warn!(
            allowed,
            needed, "The limit of open files is too low for GOZON_CONNECTIONS_MAX"
        );
    }
}

#[cfg(test)]
mod tests;
