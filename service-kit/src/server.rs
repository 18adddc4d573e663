//! Serving HTTP/1.1 with limits: a client that is slow or greedy holds nothing for long.

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

use crate::places::{Place, Places};
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
/// Connections above the limit that may be open until they are rejected. One more is closed without a response.
const REJECTED_MAX: usize = 1024;

/// The address at the other end of the connection, in the extensions of each request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer(pub IpAddr);

/// The reason for rejecting a connection, as a label of metrics.
pub(crate) const CONNECTIONS: &str = "connections";

/// The part of an address that stands for one client: an IPv6 client usually has a whole /64 network.
pub fn client_network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        v4 @ IpAddr::V4(_) => v4,
    }
}

#[derive(Clone, Copy, Debug, clap::Args)]
pub struct ConnectionArgs {
    /// HTTP connections that may be open at once; one more gets 503. One address can open three quarters of them. A
    /// gateway opens up to GOZON_REQUESTS_MAX connections to each service, and up to GOZON_WAITS_MAX more to orders.
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
    /// A request's head must be complete within this time, and a connection may be idle as long. Longer than our own
    /// clients keep idle connections, so that they close them and not the server.
    head_timeout: Duration,
    /// A client that reads nothing of what was sent to it is disconnected after this time.
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

/// Serves until `shutdown`, then lets open requests end, for at most [`DRAIN_TIMEOUT`].
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
        warn!("Some requests did not end within {DRAIN_TIMEOUT:?} and are aborted");
    }
}

/// Decides what a new connection gets.
struct Admission {
    places: Places<IpAddr>,
    head_timeout: Duration,
    router: Router,
    rejected_places: Places<IpAddr>,
    rejecting: Router,
}

struct Admitted {
    /// Held while the connection is open.
    _place: Place<IpAddr>,
    head_timeout: Duration,
    keep_alive: bool,
    router: Router,
}

impl Admission {
    fn new(limits: Limits, router: Router) -> Self {
        // Clients that open too many connections cannot make this process look dead.
        let served = router.clone();
        let probe = any(move |request: Request| served.clone().oneshot(request));
        let rejecting = Router::new()
            .route("/livez", probe.clone())
            .route("/readyz", probe)
            .fallback_service(crate::http::layered(
                Router::new().fallback(too_many_connections),
            ));
        Self {
            places: Places::new(CONNECTIONS, limits.connections_max),
            head_timeout: limits.head_timeout,
            router,
            rejected_places: Places::new(CONNECTIONS, REJECTED_MAX),
            rejecting,
        }
    }

    /// None: the connection is closed at once.
    fn admit(&self, peer: IpAddr) -> Option<Admitted> {
        let client = client_network(peer);
        match self.places.take(client) {
            Ok(place) => Some(Admitted {
                _place: place,
                head_timeout: self.head_timeout,
                keep_alive: true,
                router: self.router.clone(),
            }),
            Err(refusal) => {
                crate::metrics::refused(refusal.reason());
                let place = self.rejected_places.take(client).ok()?;
                Some(Admitted {
                    _place: place,
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
    // Counts from the last byte that the client took, also while our own buffers still have room. Other systems have no
    // such option: there a client that reads nothing keeps its connection.
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
        _place,
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
    Problem::new(Code::Overloaded).because("There are too many connections.")
}

/// The usual soft limit of 1024 is soon reached. The hard limit is what the administrator allows.
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
    // A connection of a client, and the one to the service that its request is forwarded to.
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
