//! `GET /metrics` for Prometheus.
//!
//! All code uses the facade crate `metrics`, so libraries do not depend on the exporter. Counters
//! and histograms are kept while the process runs. Callbacks set the gauges before each page, see
//! [`Metrics::refresh`]. Label values are names from the code (routes, outcomes, consumers), never
//! ids, so clients cannot create series.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use futures_util::future::{BoxFuture, join_all};
use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use metrics_util::MetricKindMask;
use tokio::sync::Mutex;
use tracing::warn;

use crate::slots;

/// If a refresh takes longer, the page is served without its gauges.
const REFRESH_TIMEOUT: Duration = Duration::from_secs(2);
/// How often recorded durations are moved from memory into their buckets.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);
/// Bucket boundaries of durations, in seconds.
const BUCKETS: [f64; 16] = [
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0,
];

const HTTP_REQUESTS: &str = "gozon_http_requests_total";
const HTTP_SECONDS: &str = "gozon_http_request_duration_seconds";
const HTTP_REFUSED: &str = "gozon_http_refused_total";
const BUILD_INFO: &str = "gozon_build_info";

type Refresh = Box<dyn Fn() -> BoxFuture<'static, Result<(), String>> + Send + Sync>;

pub struct Metrics {
    service: &'static str,
    version: &'static str,
    refreshes: Vec<Refresh>,
}

impl Metrics {
    /// Installs the recorder of this process.
    pub fn start(service: &'static str, version: &'static str) -> anyhow::Result<Self> {
        recorder()?;
        Ok(Self {
            service,
            version,
            refreshes: Vec::new(),
        }
        .refusing(&[slots::CONNECTIONS, slots::CLIENT_SHARE]))
    }

    /// Registers the reasons for which this process may reject requests. Each counter starts at 0,
    /// because an absent counter could mean "nothing rejected" or "not known".
    #[must_use]
    pub fn refusing(self, reasons: &[&'static str]) -> Self {
        for reason in reasons {
            counter!(HTTP_REFUSED, "reason" => *reason).increment(0);
        }
        self
    }

    /// Runs `refresh` before each page, to set gauges with [`metrics::gauge!`]. Describe them once
    /// at start with [`metrics::describe_gauge!`]. The page omits a gauge that was not set since
    /// the last page: if `refresh` fails or times out, no old value is shown as a new one.
    #[must_use]
    pub fn refresh<F>(mut self, refresh: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Result<(), String>> + Send + 'static,
    {
        self.refreshes.push(Box::new(move || Box::pin(refresh())));
        self
    }

    pub fn routes(self) -> Router {
        Router::new()
            .route("/metrics", get(page))
            .with_state(Arc::new(self))
    }
}

/// One recorder per process, even if several services run in it, as in tests.
fn recorder() -> anyhow::Result<&'static PrometheusHandle> {
    static RECORDER: OnceLock<Result<PrometheusHandle, BuildError>> = OnceLock::new();
    let recorder = RECORDER.get_or_init(|| {
        let builder = PrometheusBuilder::new()
            .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &BUCKETS)?
            // Removes each gauge that was not set since the last page.
            .idle_timeout(MetricKindMask::GAUGE, Some(Duration::ZERO));
        let handle = builder.install_recorder()?;
        describe_counter!(HTTP_REQUESTS, "HTTP requests answered, by route template");
        describe_histogram!(
            HTTP_SECONDS,
            "Seconds from the head of a request to the head of its response"
        );
        describe_counter!(
            HTTP_REFUSED,
            "HTTP requests rejected by a limit, by reason. Starts at 0"
        );
        describe_gauge!(BUILD_INFO, "Service and version of this process");
        Ok(handle)
    });
    recorder
        .as_ref()
        .map_err(|error| anyhow::anyhow!("the metrics recorder cannot be installed: {error}"))
}

/// Moves recorded durations into their buckets, which bounds memory even if nobody reads the page.
pub(crate) async fn upkeep() {
    loop {
        tokio::time::sleep(UPKEEP_INTERVAL).await;
        if let Ok(recorder) = recorder() {
            recorder.run_upkeep();
        }
    }
}

pub(crate) fn answered(method: &str, route: &str, status: u16, duration: Duration) {
    let labels = [("method", method.to_owned()), ("route", route.to_owned())];
    histogram!(HTTP_SECONDS, &labels).record(duration);
    let [method, route] = labels;
    counter!(
        HTTP_REQUESTS,
        &[method, route, ("status", status.to_string())]
    )
    .increment(1);
}

/// Counts a request that a limit rejected. Register the reason with [`Metrics::refusing`].
pub fn refused(reason: &'static str) {
    counter!(HTTP_REFUSED, "reason" => reason).increment(1);
}

async fn page(State(metrics): State<Arc<Metrics>>) -> Response {
    // One page at a time: of two concurrent pages, the second would omit all gauges.
    static ONE_PAGE: Mutex<()> = Mutex::const_new(());
    let _guard = ONE_PAGE.lock().await;
    gauge!(BUILD_INFO, "service" => metrics.service, "version" => metrics.version).set(1.0);
    let refreshes = metrics
        .refreshes
        .iter()
        .map(|refresh| tokio::time::timeout(REFRESH_TIMEOUT, refresh()));
    for refreshed in join_all(refreshes).await {
        match refreshed {
            Ok(Ok(())) => {}
            Ok(Err(error)) => warn!(error, "Some gauges are omitted: they could not be read"),
            Err(_) => {
                warn!("Some gauges are omitted: they were not read within {REFRESH_TIMEOUT:?}");
            }
        }
    }
    let text = recorder().map(PrometheusHandle::render).unwrap_or_default();
    (
        [
            (
                header::CONTENT_TYPE,
                "text/plain; version=0.0.4; charset=utf-8",
            ),
            (header::CACHE_CONTROL, "no-store"),
        ],
        text,
    )
        .into_response()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use axum::extract::Request;
    use http_body_util::BodyExt as _;
    use tower::ServiceExt as _;

    use super::*;

    #[tokio::test]
    async fn a_gauge_that_cannot_be_read_is_omitted_until_it_can() {
        static READABLE: AtomicBool = AtomicBool::new(true);
        let routes = Metrics::start("test", "1")
            .unwrap()
            .refresh(async || {
                if !READABLE.load(Ordering::SeqCst) {
                    return Err("the database is down".to_owned());
                }
                gauge!("test_pending", "kind" => "a").set(0.5);
                gauge!("test_pending", "kind" => "b").set(2.0);
                Ok(())
            })
            .routes();
        let page = async || {
            let request = Request::get("/metrics").body(axum::body::Body::empty());
            let response = routes.clone().oneshot(request.unwrap()).await.unwrap();
            let bytes = response.into_body().collect().await.unwrap().to_bytes();
            String::from_utf8(bytes.to_vec()).unwrap()
        };
        for readable in [true, false, false, true, true] {
            READABLE.store(readable, Ordering::SeqCst);
            let page = page().await;
            for line in [
                "test_pending{kind=\"a\"} 0.5\n",
                "test_pending{kind=\"b\"} 2\n",
            ] {
                assert_eq!(page.contains(line), readable, "{line}{page}");
            }
            assert!(page.contains("gozon_build_info{service=\"test\",version=\"1\"} 1\n"));
        }
        let pages = tokio::join!(page(), page());
        assert!(pages.0.contains("test_pending") && pages.1.contains("test_pending"));
    }
}
