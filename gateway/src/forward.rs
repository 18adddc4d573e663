//! Forwards requests to the services. Answers with a problem document if a service is unavailable.

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
use service_kit::server::DRAIN_TIMEOUT;

use crate::client::Client;
use crate::limits::{Limits, requested_wait};
use crate::service::Service;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Time limit for a service's response; after it the outcome is unknown. If its database is
/// unavailable, a service retries for 5 s, and the last attempt may take 3 s more. So it still has
/// time to report that.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Time limit for a service's response after a shutdown begins. Less than [`DRAIN_TIMEOUT`], so
/// that the client still gets an answer.
const LAST_ANSWER_TIMEOUT: Duration = Duration::from_secs(4);
const _: () = assert!(LAST_ANSWER_TIMEOUT.as_secs() < DRAIN_TIMEOUT.as_secs());
/// Shorter than the servers keep idle connections, so that no request is sent on a connection that
/// is being closed.
const IDLE_CONNECTION_TIMEOUT: Duration = Duration::from_secs(20);
/// Maximum size of a response. The largest is a page of 100 orders, each a few kilobytes.
const ANSWER_BYTES_MAX: usize = 1024 * 1024;

/// The request headers that are forwarded. All others are dropped, such as cookies, credentials,
/// and headers that belong to a proxy in front.
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

    /// When `shutdown` begins, requests in progress are answered before the drain ends.
    pub(crate) fn with_shutdown(self, shutdown: CancellationToken) -> Self {
        Self { shutdown, ..self }
    }

    /// Forwards a request and returns the service's response, or a problem if there is none.
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
            // Rejects a malformed key, without a request to the service.
            key::find(&parts.headers)?;
        }
        // The body of a GET has no meaning.
        let body = if parts.method == Method::POST {
            input::read(body).await?
        } else {
            Bytes::new()
        };
        self.limits.admit_user(&parts.method, &parts.uri, &body)?;
        let wait = requested_wait(&parts.method, &parts.uri);
        let _slot = if wait.is_zero() {
            self.limits.request_slot(service, client)?
        } else {
            self.limits.wait_slot(client)?
        };
        let without_wait = (!wait.is_zero()).then(|| {
            format!("{}?wait=0", parts.uri.path())
                .parse()
                .expect("a path of a URI")
        });
        let mut outgoing = axum::http::Request::new(Full::new(body));
        // Forwards a HEAD as a GET: hyper omits the body, and Content-Length is correct.
        *outgoing.method_mut() = if parts.method == Method::HEAD {
            Method::GET
        } else {
            parts.method
        };
        *outgoing.uri_mut() = self.uri(service, parts.uri.path_and_query().cloned());
        *outgoing.headers_mut() = only(&REQUEST_HEADERS, &parts.headers);
        let without_wait = without_wait.map(|path| {
            let mut outgoing = outgoing.clone();
            *outgoing.uri_mut() = self.uri(service, Some(path));
            outgoing
        });

        let answered = tokio::select! {
            answered = self.exchange(outgoing, ANSWER_TIMEOUT + wait) => answered,
            // During a shutdown, a request that waits for an order gets its current state.
            answered = self.last_exchange(without_wait) => answered,
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
            Failed::OutcomeUnknown(error) => {
                warn!(service = ?service, error, "A service did not complete its response");
                Err(service.unavailable().outcome_unknown())
            }
        }
    }

    /// Sends a request and reads the whole response within a time limit.
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
                .map_err(|error| Failed::OutcomeUnknown(error.to_string()))?;
            failpoint!("gateway.after_forward")
                .map_err(|injected| Failed::OutcomeUnknown(injected.to_string()))?;
            Ok((parts, body.to_bytes()))
        };
        timeout(within, exchange).await.unwrap_or_else(|_| {
            Err(Failed::OutcomeUnknown(format!(
                "no answer within {within:?}"
            )))
        })
    }

    /// Waits until a shutdown begins. Then sends `instead`; without it, fails after
    /// [`LAST_ANSWER_TIMEOUT`].
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
                self.drain_deadline().await;
                Err(Failed::OutcomeUnknown(
                    "the gateway is shutting down".to_owned(),
                ))
            }
        }
    }

    /// Returns [`LAST_ANSWER_TIMEOUT`] after a shutdown has begun.
    async fn drain_deadline(&self) {
        self.shutdown.cancelled().await;
        tokio::time::sleep(LAST_ANSWER_TIMEOUT).await;
    }

    /// Sends a GET and returns its JSON. Any status but 200 is an error. `trace` comes from
    /// [`trace_of`].
    pub(crate) async fn read(
        &self,
        service: Service,
        client: Client,
        path: &str,
        trace: HeaderMap,
    ) -> Result<serde_json::Value, Problem> {
        let _slot = self.limits.request_slot(service, client)?;
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
                read = timeout(ANSWER_TIMEOUT, exchange) => read
                    .unwrap_or_else(|_| Err(format!("no answer within {ANSWER_TIMEOUT:?}"))),
                () = self.drain_deadline() => Err("the gateway is shutting down".to_owned()),
            }
        };
        read.await.map_err(|error| {
            warn!(service = ?service, error, "A service did not return the requested data");
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
            .map_err(|error| format!("unreachable: {error}"))?;
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
    /// The service did not receive the request.
    NotReached(String),
    /// The service may have executed the request.
    OutcomeUnknown(String),
}

impl From<hyper_util::client::legacy::Error> for Failed {
    fn from(error: hyper_util::client::legacy::Error) -> Self {
        let connecting = error.is_connect();
        let words = format!("{:#}", anyhow::Error::from(error));
        if connecting {
            Self::NotReached(words)
        } else {
            Self::OutcomeUnknown(words)
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
        .with_context(|| format!("{url} has no host"))
}

/// The headers that identify the original request in the logs and traces of the services.
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
