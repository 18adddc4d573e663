//! Forwards requests to the services, and answers for a service that is unavailable.

use std::time::Duration;

use anyhow::Context as _;
use axum::body::Body;
use axum::extract::Request;
use axum::http::response;
use axum::http::uri::{Authority, PathAndQuery, Scheme};
use axum::http::{HeaderMap, HeaderName, Method, Response, StatusCode, Uri, header};
use axum::response::IntoResponse as _;
use bytes::Bytes;
use failpoint::failpoint;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use service_kit::Problem;
use service_kit::http::REQUEST_ID;
use service_kit::input;
use service_kit::input::key::{self, IDEMPOTENCY_KEY, IDEMPOTENCY_REPLAYED};
use service_kit::problem::Code;
use service_kit::server::DRAIN_TIMEOUT;

use crate::client::Client;
use crate::limits::{Limits, wait_asked_for};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// While its database is unavailable, a service retries for 5 s, and the last attempt may take 3 s more: this leaves it
/// time to report that. After this time the client is told that the outcome is unknown.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for a service's response after a shutdown begins: less than [`DRAIN_TIMEOUT`], so that the client still gets one.
const LAST_ANSWER_TIMEOUT: Duration = Duration::from_secs(4);
const _: () = assert!(LAST_ANSWER_TIMEOUT.as_secs() < DRAIN_TIMEOUT.as_secs());
/// Shorter than our servers keep idle connections, so that no request is sent on a connection that is being closed.
const IDLE_CONNECTION_TIMEOUT: Duration = Duration::from_secs(20);
/// The largest response is a page of 100 orders of a few kilobytes each.
const ANSWER_BYTES_MAX: usize = 1024 * 1024;

/// Nothing else is forwarded: no cookie, no credential, no header that a proxy in front might have trusted.
const REQUEST_HEADERS: [HeaderName; 8] = [
    header::ACCEPT,
    header::CONTENT_ENCODING,
    header::CONTENT_TYPE,
    IDEMPOTENCY_KEY,
    REQUEST_ID,
    TRACEPARENT,
    TRACESTATE,
    header::IF_NONE_MATCH,
];
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
const ANSWER_HEADERS: [HeaderName; 7] = [
    header::ALLOW,
    header::CACHE_CONTROL,
    header::CONTENT_TYPE,
    header::ETAG,
    header::LOCATION,
    header::RETRY_AFTER,
    IDEMPOTENCY_REPLAYED,
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Service {
    Orders,
    Payments,
}

impl Service {
    pub(crate) fn unavailable(self) -> Problem {
        Problem::new(Code::ServiceUnavailable).because(match self {
            Self::Orders => "Orders Service temporarily unavailable.",
            Self::Payments => "Payments Service temporarily unavailable.",
        })
    }
}

type Outgoing = axum::http::Request<Full<Bytes>>;

/// Cheap to clone.
#[derive(Clone)]
pub(crate) struct Forwarder {
    http: HttpClient<HttpConnector, Full<Bytes>>,
    orders: Authority,
    payments: Authority,
    limits: Limits,
    shutdown: CancellationToken,
}

impl Forwarder {
    pub(crate) fn new(orders: &Uri, payments: &Uri, limits: Limits) -> anyhow::Result<Self> {
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
        connector.set_nodelay(true);
        let http = HttpClient::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_CONNECTION_TIMEOUT)
            .build(connector);
        Ok(Self {
            http,
            orders: authority(orders).context("GOZON_ORDERS_URL")?,
            payments: authority(payments).context("GOZON_PAYMENTS_URL")?,
            limits,
            shutdown: CancellationToken::new(),
        })
    }

    /// Once `shutdown` begins, requests that wait for a service are answered in time for the drain.
    pub(crate) fn until(self, shutdown: CancellationToken) -> Self {
        Self { shutdown, ..self }
    }

    /// Forwards a request and returns the response, whatever it is.
    pub(crate) async fn forward(
        self,
        service: Service,
        client: Client,
        request: Request,
    ) -> Response<Body> {
        self.try_forward(service, client, request)
            .await
            .into_response()
    }

    async fn try_forward(
        &self,
        service: Service,
        client: Client,
        request: Request,
    ) -> Result<Response<Body>, Problem> {
        let (parts, body) = request.into_parts();
        if parts.method == Method::POST {
            // A malformed key is rejected here, without a request to the service.
            key::find(&parts.headers)?;
        }
        // The body of a GET has no meaning.
        let body = if parts.method == Method::POST {
            input::read(body).await?
        } else {
            Bytes::new()
        };
        self.limits.admit_user(&parts.method, &parts.uri, &body)?;
        let wait = wait_asked_for(&parts.method, &parts.uri);
        let _place = if wait.is_zero() {
            self.limits.place(service, client)?
        } else {
            self.limits.wait(client)?
        };
        let at_once = (!wait.is_zero()).then(|| {
            format!("{}?wait=0", parts.uri.path())
                .parse()
                .expect("a path of a URI")
        });
        let mut outgoing = axum::http::Request::new(Full::new(body));
        // A HEAD is forwarded as a GET: hyper leaves out the body, and Content-Length is right.
        *outgoing.method_mut() = if parts.method == Method::HEAD {
            Method::GET
        } else {
            parts.method
        };
        *outgoing.uri_mut() = self.uri(service, parts.uri.path_and_query().cloned());
        *outgoing.headers_mut() = only(&REQUEST_HEADERS, &parts.headers);
        let at_once = at_once.map(|path| {
            let mut outgoing = outgoing.clone();
            *outgoing.uri_mut() = self.uri(service, Some(path));
            outgoing
        });

        let answered = tokio::select! {
            answered = self.exchange(outgoing, ANSWER_TIMEOUT + wait) => answered,
            // During a shutdown a waiting client gets the order as it is now.
            answered = self.last_exchange(at_once) => answered,
        };
        let failed = match answered {
            Ok((parts, body)) => {
                let mut answer = Response::new(Body::from(body));
                *answer.status_mut() = parts.status;
                *answer.headers_mut() = only(&ANSWER_HEADERS, &parts.headers);
                return Ok(answer);
            }
            Err(failed) => failed,
        };
        match failed {
            Failed::NotReached(error) => {
                warn!(service = ?service, error, "A service could not be reached");
                Err(service.unavailable())
            }
            Failed::Midway(error) => {
                warn!(service = ?service, error, "A service did not complete its response");
                Err(service.unavailable().outcome_unknown())
            }
        }
    }

    /// Sends a request and reads the whole response, within this time.
    async fn exchange(
        &self,
        request: Outgoing,
        within: Duration,
    ) -> Result<(response::Parts, Bytes), Failed> {
        let exchange = async {
            failpoint!("gateway.before_forward")
                .map_err(|injected| Failed::NotReached(injected.to_string()))?;
            let (parts, body) = self
                .http
                .request(request)
                .await
                .map_err(Failed::from)?
                .into_parts();
            let body = Limited::new(body, ANSWER_BYTES_MAX)
                .collect()
                .await
                .map_err(|error| Failed::Midway(error.to_string()))?;
            failpoint!("gateway.after_forward")
                .map_err(|injected| Failed::Midway(injected.to_string()))?;
            Ok((parts, body.to_bytes()))
        };
        timeout(within, exchange)
            .await
            .unwrap_or_else(|_| Err(Failed::Midway(format!("no answer within {within:?}"))))
    }

    /// Once a shutdown begins: sends `instead`, or fails after [`LAST_ANSWER_TIMEOUT`]. Pending until then.
    async fn last_exchange(
        &self,
        instead: Option<Outgoing>,
    ) -> Result<(response::Parts, Bytes), Failed> {
        match instead {
            Some(request) => {
                self.shutdown.cancelled().await;
                self.exchange(request, LAST_ANSWER_TIMEOUT).await
            }
            None => {
                self.last_moment().await;
                Err(Failed::Midway("the gateway stops".to_owned()))
            }
        }
    }

    /// Returns when a shutdown has begun and clients that still wait must be answered.
    async fn last_moment(&self) {
        self.shutdown.cancelled().await;
        tokio::time::sleep(LAST_ANSWER_TIMEOUT).await;
    }

    /// The body of a successful GET. `trace` are the headers of [`trace_of`].
    pub(crate) async fn read(
        &self,
        service: Service,
        client: Client,
        path: &str,
        trace: HeaderMap,
    ) -> Result<serde_json::Value, Problem> {
        let _place = self.limits.place(service, client)?;
        let path = path
            .parse::<PathAndQuery>()
            .map_err(|_| service.unavailable())?;
        let mut request = axum::http::Request::new(Full::default());
        *request.uri_mut() = self.uri(service, Some(path));
        *request.headers_mut() = trace;
        let exchange = async {
            let answer = self
                .http
                .request(request)
                .await
                .map_err(|error| error.to_string())?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX)
                .collect()
                .await
                .map_err(|error| error.to_string())?;
            if status != StatusCode::OK {
                return Err(format!("answers {status}"));
            }
            serde_json::from_slice(&body.to_bytes()).map_err(|error| error.to_string())
        };
        let read = async {
            tokio::select! {
                read = timeout(ANSWER_TIMEOUT, exchange) => read.unwrap_or_else(|_| Err(format!("no answer within {ANSWER_TIMEOUT:?}"))),
                () = self.last_moment() => Err("the gateway stops".to_owned()),
            }
        };
        read.await.map_err(|error| {
            warn!(service = ?service, error, "A service could not be read");
            service.unavailable()
        })
    }

    pub(crate) async fn probe(self, service: Service) -> Result<(), String> {
        let mut request = axum::http::Request::new(Full::default());
        *request.uri_mut() = self.uri(service, Some(PathAndQuery::from_static("/readyz")));
        let answer = self
            .http
            .request(request)
            .await
            .map_err(|error| format!("not reached: {error}"))?;
        if answer.status() == StatusCode::OK {
            Ok(())
        } else {
            Err(format!("answers {}", answer.status()))
        }
    }

    fn uri(&self, service: Service, path_and_query: Option<PathAndQuery>) -> Uri {
        let authority = match service {
            Service::Orders => &self.orders,
            Service::Payments => &self.payments,
        };
        let path_and_query = path_and_query.unwrap_or_else(|| PathAndQuery::from_static("/"));
        Uri::builder()
            .scheme(Scheme::HTTP)
            .authority(authority.clone())
            .path_and_query(path_and_query)
            .build()
            .expect("scheme, authority and path make a URI")
    }
}

enum Failed {
    /// The service did not get the request.
    NotReached(String),
    /// The service may have executed the request.
    Midway(String),
}

impl From<hyper_util::client::legacy::Error> for Failed {
    fn from(error: hyper_util::client::legacy::Error) -> Self {
        let connecting = error.is_connect();
        let words = format!("{:#}", anyhow::Error::from(error));
        if connecting {
            Self::NotReached(words)
        } else {
            Self::Midway(words)
        }
    }
}

fn authority(url: &Uri) -> anyhow::Result<Authority> {
    anyhow::ensure!(
        url.scheme() == Some(&Scheme::HTTP) && url.path() == "/" && url.query().is_none(),
        "{url} must look like http://host:port"
    );
    url.authority()
        .cloned()
        .with_context(|| format!("{url} names no host"))
}

/// The headers that connect the requests caused by one request in logs and traces.
pub(crate) fn trace_of(headers: &HeaderMap) -> HeaderMap {
    only(&[REQUEST_ID, TRACEPARENT, TRACESTATE], headers)
}

fn only(names: &[HeaderName], from: &HeaderMap) -> HeaderMap {
    let mut to = HeaderMap::with_capacity(names.len());
    for name in names {
        for value in from.get_all(name) {
            to.append(name.clone(), value.clone());
        }
    }
    to
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_url_is_checked() {
        for good in ["http://127.0.0.1:8081", "http://orders:8081/"] {
            assert!(authority(&good.parse().unwrap()).is_ok(), "{good}");
        }
        for bad in [
            "https://orders",
            "/orders",
            "http://orders/base",
            "orders:8081",
        ] {
            assert!(authority(&bad.parse().unwrap()).is_err(), "{bad}");
        }
    }
}
