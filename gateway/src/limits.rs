//! Rate limits per client and per user, and concurrency limits per service. A request above a limit
//! is rejected at once, with Retry-After.

use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::{Method, Uri};
use axum::middleware::Next;
use axum::response::Response;
use governor::clock::{Clock as _, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use percent_encoding::percent_decode_str;
use serde::Deserialize;
use tokio_util::sync::CancellationToken;

use service_kit::Problem;
use service_kit::metrics::refused;
use service_kit::problem::Code;
use service_kit::server::Peer;
use service_kit::slots::{Slot, Slots};
use shared_contracts::UserId;

use crate::client::Client;
use crate::service::Service;

/// Maximum of the parameter `wait` of an order.
const WAIT_SECONDS_MAX: u64 = 30;
/// How often the state of inactive clients and users is removed.
const FORGET_INTERVAL: Duration = Duration::from_secs(10);

/// Metric labels: the reasons for rejecting a request.
pub(crate) const REASONS: [&str; 6] = [
    ORDERS_REQUESTS,
    PAYMENTS_REQUESTS,
    WAITS,
    EVENT_STREAMS,
    IP_RATE,
    USER_RATE,
];
const ORDERS_REQUESTS: &str = "orders_requests";
const PAYMENTS_REQUESTS: &str = "payments_requests";
const WAITS: &str = "waits";
const EVENT_STREAMS: &str = "event_streams";
const IP_RATE: &str = "ip_rate";
const USER_RATE: &str = "user_rate";

#[derive(Clone, Debug, clap::Args)]
pub struct LimitArgs {
    /// Maximum number of concurrent requests to each service; further ones get 503. The default is
    /// less than a service can queue. One address can have at most three quarters of them; the same
    /// share applies to waits and event streams.
    #[arg(long, env = "GOZON_REQUESTS_MAX", default_value_t = 512)]
    pub requests_max: usize,
    /// Maximum number of concurrent requests that wait for an order (`?wait=`), counted separately.
    #[arg(long, env = "GOZON_WAITS_MAX", default_value_t = 1024)]
    pub waits_max: usize,
    /// Maximum number of concurrent event streams; further ones get 503.
    #[arg(long, env = "GOZON_EVENT_STREAMS_MAX", default_value_t = 1024)]
    pub event_streams_max: usize,
    /// Maximum requests per second from one address; bursts may be as large. Unlimited by default.
    #[arg(long, env = "GOZON_RATE_PER_IP")]
    pub rate_per_ip: Option<NonZeroU32>,
    /// Maximum requests per second for one user; bursts may be as large. Unlimited by default.
    #[arg(long, env = "GOZON_RATE_PER_USER")]
    pub rate_per_user: Option<NonZeroU32>,
    /// Addresses of trusted proxies, separated by commas. X-Forwarded-For is ignored from all
    /// others.
    #[arg(long, env = "GOZON_TRUSTED_PROXIES", value_delimiter = ',')]
    pub trusted_proxies: Vec<IpAddr>,
}

/// Cheap to clone.
#[derive(Clone)]
pub(crate) struct Limits(Arc<Inner>);

struct Inner {
    orders: Slots<Client>,
    payments: Slots<Client>,
    waits: Slots<Client>,
    event_streams: Slots<Client>,
    per_ip: Option<DefaultKeyedRateLimiter<Client>>,
    per_user: Option<DefaultKeyedRateLimiter<UserId>>,
    trusted_proxies: Vec<IpAddr>,
}

impl Limits {
    pub(crate) fn new(arguments: LimitArgs) -> Self {
        Self(Arc::new(Inner {
            orders: Slots::new(ORDERS_REQUESTS, arguments.requests_max),
            payments: Slots::new(PAYMENTS_REQUESTS, arguments.requests_max),
            waits: Slots::new(WAITS, arguments.waits_max),
            event_streams: Slots::new(EVENT_STREAMS, arguments.event_streams_max),
            per_ip: arguments
                .rate_per_ip
                .map(|rate| RateLimiter::keyed(Quota::per_second(rate))),
            per_user: arguments
                .rate_per_user
                .map(|rate| RateLimiter::keyed(Quota::per_second(rate))),
            trusted_proxies: arguments.trusted_proxies,
        }))
    }

    /// Removes the state of inactive clients and users from time to time, until `shutdown`.
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

    /// Applies the rate limit of the user that the request is about.
    pub(crate) fn admit_user(
        &self,
        method: &Method,
        uri: &Uri,
        body: &[u8],
    ) -> Result<(), Problem> {
        match &self.0.per_user {
            None => Ok(()),
            Some(per_user) => match user_of(method, uri, body) {
                Some(user) => check(per_user, &user, USER_RATE, "for this user"),
                None => Ok(()),
            },
        }
    }

    /// Takes a slot for a request that does not wait for an order.
    pub(crate) fn request_slot(
        &self,
        service: Service,
        client: Client,
    ) -> Result<Slot<Client>, Problem> {
        take(
            match service {
                Service::Orders => &self.0.orders,
                Service::Payments => &self.0.payments,
            },
            client,
        )
    }

    /// Takes a slot for a request that waits for an order.
    pub(crate) fn wait_slot(&self, client: Client) -> Result<Slot<Client>, Problem> {
        take(&self.0.waits, client)
    }

    /// Takes a slot for an event stream.
    pub(crate) fn event_stream_slot(&self, client: Client) -> Result<Slot<Client>, Problem> {
        take(&self.0.event_streams, client)
    }
}

fn take(slots: &Slots<Client>, client: Client) -> Result<Slot<Client>, Problem> {
    slots.take(client).map_err(|refusal| {
        refused(refusal.reason());
        refusal.into()
    })
}

/// Identifies the client of each request and applies its rate limit. Slots are taken later, when
/// the body is complete, so a client that sends slowly holds none.
pub(crate) async fn admit(
    State(limits): State<Limits>,
    mut request: Request,
    next: Next,
) -> Result<Response, Problem> {
    let Peer(peer) = request.extensions().get().expect("the server sets it");
    let client = Client::identify(*peer, request.headers(), &limits.0.trusted_proxies);
    if let Some(per_ip) = &limits.0.per_ip {
        check(per_ip, &client, IP_RATE, "from your address")?;
    }
    request.extensions_mut().insert(client);
    Ok(next.run(request).await)
}

fn check<K>(
    limiter: &DefaultKeyedRateLimiter<K>,
    key: &K,
    reason: &'static str,
    scope: &str,
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
        let cause = format!("Too many requests came {scope}, so this one was not executed.");
        Problem::new(Code::RateLimited)
            .because(cause)
            .retry_after(seconds)
    })
}

/// The first query parameter with this name.
fn parameter(uri: &Uri, name: &str) -> Option<String> {
    form_urlencoded::parse(uri.query()?.as_bytes())
        .find(|(found, _)| found == name)
        .map(|(_, value)| value.into_owned())
}

fn decoded(text: &str) -> String {
    percent_decode_str(text).decode_utf8_lossy().into_owned()
}

/// How long the request wants to wait. Only a request for a single order can wait.
pub(crate) fn requested_wait(method: &Method, uri: &Uri) -> Duration {
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

/// The user of a request, read from the same part as the service reads it. Otherwise a client could
/// name another user elsewhere and bypass the limit.
fn user_of(method: &Method, uri: &Uri, body: &[u8]) -> Option<UserId> {
    #[derive(Deserialize)]
    struct HasUser {
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
        serde_json::from_slice::<HasUser>(body)
            .ok()
            .map(|body| body.user_id)
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

    #[test]
    fn the_user_is_read_from_the_same_part_as_in_the_service() {
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
            "encoding does not bypass the limit"
        );
        assert_eq!(
            get("/v1/orders?user%5Fid=%61lice").as_deref(),
            Some("alice")
        );
        assert_eq!(
            post("/v1/orders?user_id=x1", order).as_deref(),
            Some("alice"),
            "the query cannot name another user"
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
    fn only_a_request_for_one_order_waits_and_only_up_to_the_maximum() {
        let wait = |method, uri: &str| requested_wait(&method, &uri.parse().unwrap()).as_secs();
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
