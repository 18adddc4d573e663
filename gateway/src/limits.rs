//! Limits by client address, by user, and for all requests in progress. A request above a limit is rejected at once, with
//! the time after which to send it again.

use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, Method, Uri};
use axum::middleware::Next;
use axum::response::Response;
use governor::clock::{Clock as _, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use percent_encoding::percent_decode_str;
use serde::Deserialize;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use service_kit::Problem;
use service_kit::metrics::refused;
use service_kit::problem::Code;
use service_kit::server::Peer;
use shared_contracts::UserId;

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
/// The maximum of `?wait=` of an order.
const WAIT_SECONDS_MAX: u64 = 30;
/// How often the state of inactive addresses and users is removed.
const FORGET_INTERVAL: Duration = Duration::from_secs(10);

/// Reasons for rejecting requests, as labels of metrics.
pub(crate) const REASONS: [&str; 4] = ["requests", "ip_rate", "user_rate", EVENT_STREAMS];
pub(crate) const EVENT_STREAMS: &str = "event_streams";

#[derive(Clone, Debug, clap::Args)]
pub struct LimitArgs {
    /// Requests that may be in progress at once; one more is rejected. Fewer than the services can queue.
    #[arg(long, env = "GOZON_REQUESTS_MAX", default_value_t = 512)]
    pub requests_max: usize,
    /// Requests that may wait for an order (`?wait=`) at once, in addition to the others.
    #[arg(long, env = "GOZON_WAITS_MAX", default_value_t = 1024)]
    pub waits_max: usize,
    /// Requests a second from one address, in bursts of as many. No limit if absent.
    #[arg(long, env = "GOZON_RATE_PER_IP")]
    pub rate_per_ip: Option<NonZeroU32>,
    /// Requests a second for one user, in bursts of as many. No limit if absent.
    #[arg(long, env = "GOZON_RATE_PER_USER")]
    pub rate_per_user: Option<NonZeroU32>,
    /// Addresses of proxies, separated by commas, whose header X-Forwarded-For is trusted. It is ignored from all others.
    #[arg(long, env = "GOZON_TRUSTED_PROXIES", value_delimiter = ',')]
    pub trusted_proxies: Vec<IpAddr>,
}

/// Cheap to clone.
#[derive(Clone)]
pub(crate) struct Limits(Arc<Inner>);

struct Inner {
    working: Semaphore,
    waiting: Semaphore,
    per_ip: Option<DefaultKeyedRateLimiter<IpAddr>>,
    per_user: Option<DefaultKeyedRateLimiter<UserId>>,
    trusted_proxies: Vec<IpAddr>,
}

impl Limits {
    pub(crate) fn new(arguments: LimitArgs) -> Self {
        Self(Arc::new(Inner {
            working: Semaphore::new(arguments.requests_max),
            waiting: Semaphore::new(arguments.waits_max),
            per_ip: arguments
                .rate_per_ip
                .map(|rate| RateLimiter::keyed(Quota::per_second(rate))),
            per_user: arguments
                .rate_per_user
                .map(|rate| RateLimiter::keyed(Quota::per_second(rate))),
            trusted_proxies: arguments.trusted_proxies,
        }))
    }

    /// Removes the state of inactive addresses and users, until `shutdown`.
    pub(crate) async fn run(&self, shutdown: CancellationToken) {
        while shutdown
            .run_until_cancelled(tokio::time::sleep(FORGET_INTERVAL))
            .await
            .is_some()
        {
            if let Some(per_ip) = &self.0.per_ip {
                per_ip.retain_recent();
                per_ip.shrink_to_fit();
            }
            if let Some(per_user) = &self.0.per_user {
                per_user.retain_recent();
                per_user.shrink_to_fit();
            }
        }
    }

    /// Counts a request for the user whom it concerns.
    pub(crate) fn admit_user(
        &self,
        method: &Method,
        uri: &Uri,
        body: &[u8],
    ) -> Result<(), Problem> {
        match &self.0.per_user {
            None => Ok(()),
            Some(per_user) => match user_of(method, uri, body) {
                Some(user) => check(per_user, &user, "user_rate", "for this user"),
                None => Ok(()),
            },
        }
    }

    fn client(&self, peer: IpAddr, headers: &HeaderMap) -> IpAddr {
        let trusted = |address: &IpAddr| self.0.trusted_proxies.contains(address);
        if !trusted(&peer) {
            return peer;
        }
        // Each proxy appends the address of its caller, so only addresses after the last untrusted one are certain.
        let named: Vec<&str> = headers
            .get_all(FORWARDED_FOR)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|list| list.split(','))
            .collect();
        let mut last = peer;
        for name in named.into_iter().rev() {
            let Ok(address) = name.trim().parse() else {
                break;
            };
            last = address;
            if !trusted(&address) {
                break;
            }
        }
        last
    }
}

pub(crate) async fn admit(
    State(limits): State<Limits>,
    request: Request,
    next: Next,
) -> Result<Response, Problem> {
    if let (Some(per_ip), Some(Peer(peer))) = (&limits.0.per_ip, request.extensions().get::<Peer>())
    {
        check(
            per_ip,
            &limits.client(*peer, request.headers()),
            "ip_rate",
            "from your address",
        )?;
    }
    let waits = !wait_asked_for(request.method(), request.uri()).is_zero();
    let places = if waits {
        &limits.0.waiting
    } else {
        &limits.0.working
    };
    let Ok(_place) = places.try_acquire() else {
        refused("requests");
        return Err(Code::Overloaded.into());
    };
    Ok(next.run(request).await)
}

fn check<K>(
    limiter: &DefaultKeyedRateLimiter<K>,
    key: &K,
    reason: &'static str,
    whose: &str,
) -> Result<(), Problem>
where
    K: Clone + Eq + std::hash::Hash,
{
    limiter.check_key(key).map_err(|earliest| {
        refused(reason);
        let wait = earliest.wait_time_from(DefaultClock::default().now());
        let seconds = u32::try_from(wait.as_millis().div_ceil(1000))
            .unwrap_or(u32::MAX)
            .max(1);
        let cause = format!("Too many requests came {whose}, so this one was not executed.");
        Problem::new(Code::RateLimited)
            .because(cause)
            .retry_after(seconds)
    })
}

/// The first parameter with this name.
fn parameter(uri: &Uri, name: &str) -> Option<String> {
    form_urlencoded::parse(uri.query()?.as_bytes())
        .find(|(found, _)| found == name)
        .map(|(_, value)| value.into_owned())
}

fn decoded(text: &str) -> String {
    percent_decode_str(text).decode_utf8_lossy().into_owned()
}

/// How long a request asks to wait. Only a single order can be waited for.
pub(crate) fn wait_asked_for(method: &Method, uri: &Uri) -> Duration {
    let one_order = uri
        .path()
        .strip_prefix("/v1/orders/")
        .is_some_and(|id| !id.contains('/') && id != "events");
    if method == Method::POST || !one_order {
        return Duration::ZERO;
    }
    let seconds = parameter(uri, "wait")
        .and_then(|seconds| seconds.parse().ok())
        .unwrap_or(0);
    Duration::from_secs(seconds.min(WAIT_SECONDS_MAX))
}

/// The user of a request, read from where the service reads it: elsewhere a client could name another user to bypass
/// the limit.
fn user_of(method: &Method, uri: &Uri, body: &[u8]) -> Option<UserId> {
    #[derive(Deserialize)]
    struct Whose {
        user_id: String,
    }
    let in_path = || {
        uri.path()
            .strip_prefix("/v1/accounts/")?
            .split('/')
            .next()
            .map(decoded)
    };
    let in_query = || parameter(uri, "user_id");
    let in_body = || {
        serde_json::from_slice::<Whose>(body)
            .ok()
            .map(|whose| whose.user_id)
    };
    let named = match in_path() {
        Some(user) => Some(user),
        None if method == Method::POST => in_body(),
        None => in_query(),
    };
    UserId::parse(named?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(trusted_proxies: &[&str]) -> Limits {
        Limits::new(LimitArgs {
            requests_max: 1,
            waits_max: 1,
            rate_per_ip: None,
            rate_per_user: None,
            trusted_proxies: trusted_proxies
                .iter()
                .map(|address| address.parse().unwrap())
                .collect(),
        })
    }

    #[test]
    fn only_a_trusted_proxy_says_who_the_client_is() {
        let client = |limits: &Limits, peer: &str, header: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(FORWARDED_FOR, header.parse().unwrap());
            limits.client(peer.parse().unwrap(), &headers).to_string()
        };
        let (nobody, proxy) = (limits(&[]), limits(&["10.0.0.1", "10.0.0.2"]));
        assert_eq!(client(&nobody, "10.0.0.1", "1.1.1.1"), "10.0.0.1");
        assert_eq!(
            client(&proxy, "9.9.9.9", "1.1.1.1"),
            "9.9.9.9",
            "a stranger claims to be a proxy"
        );
        assert_eq!(client(&proxy, "10.0.0.1", "1.1.1.1"), "1.1.1.1");
        assert_eq!(
            client(&proxy, "10.0.0.1", "6.6.6.6, 1.1.1.1"),
            "1.1.1.1",
            "the client claims to be a proxy of another"
        );
        assert_eq!(
            client(&proxy, "10.0.0.1", "6.6.6.6, 1.1.1.1, 10.0.0.2"),
            "1.1.1.1",
            "two proxies of ours"
        );
        assert_eq!(client(&proxy, "10.0.0.1", "nonsense"), "10.0.0.1");
    }

    #[test]
    fn the_user_of_a_request_is_found_where_the_service_will_read_it() {
        let user = |method, uri: &str, body: &str| {
            user_of(&method, &uri.parse().unwrap(), body.as_bytes()).map(|user| user.to_string())
        };
        let (get, post) = (
            |uri| user(Method::GET, uri, ""),
            |uri, body| user(Method::POST, uri, body),
        );
        let order = r#"{"amount":1,"user_id":"alice"}"#;
        assert_eq!(
            post("/v1/accounts/alice/deposits", r#"{"amount":1}"#).as_deref(),
            Some("alice")
        );
        assert_eq!(
            get("/v1/orders?limit=1&user_id=alice").as_deref(),
            Some("alice")
        );
        assert_eq!(post("/v1/orders", order).as_deref(), Some("alice"));
        assert_eq!(
            get("/v1/accounts/%61lice").as_deref(),
            Some("alice"),
            "no way around a limit"
        );
        assert_eq!(
            get("/v1/orders?user%5Fid=%61lice").as_deref(),
            Some("alice")
        );
        assert_eq!(
            post("/v1/orders?user_id=x1", order).as_deref(),
            Some("alice"),
            "nobody else can be named"
        );
        assert_eq!(
            post(
                "/v1/accounts/alice/deposits?user_id=x1",
                r#"{"user_id":"x1"}"#
            )
            .as_deref(),
            Some("alice")
        );
        for nobody in ["", "{", r#"{"user_id":7}"#, r#"{"user_id":"a b"}"#] {
            assert_eq!(post("/v1/orders", nobody), None, "{nobody}");
        }
    }

    #[test]
    fn a_wait_for_an_order_is_waited_for_and_bounded() {
        let wait = |method, uri: &str| wait_asked_for(&method, &uri.parse().unwrap()).as_secs();
        let get = |uri| wait(Method::GET, uri);
        assert_eq!(
            [
                get("/v1/orders/1?wait=7"),
                get("/v1/orders/1?a=b&wait=99999"),
                get("/v1/orders/1?wait=x")
            ],
            [7, 30, 0]
        );
        assert_eq!(wait(Method::HEAD, "/v1/orders/1?wait=7"), 7);
        for other in [
            "/v1/orders?wait=7",
            "/v1/orders/1/timeline?wait=7",
            "/v1/orders/events?wait=7",
            "/v1/accounts/a?wait=7",
        ] {
            assert_eq!(get(other), 0, "{other}");
        }
        assert_eq!(wait(Method::POST, "/v1/orders/1?wait=7"), 0);
    }
}
