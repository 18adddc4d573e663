//! `GET /metrics` for Prometheus: what was counted while the process ran, and what is looked up when it is asked.
//!
//! Counters and durations go through the facade crate `metrics`, so that libraries count without knowing who reads. Labels
//! are names from the code (routes, outcomes, consumers), never ids: there are few of them, whatever clients send.

use std::fmt::Write as _;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use futures_util::future::{BoxFuture, join_all};
use metrics::{counter, describe_counter, describe_histogram, histogram};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use tracing::warn;

/// A look that takes longer is left out of the page.
const LOOK_TIMEOUT: Duration = Duration::from_secs(2);
/// Durations wait in memory to be put into their buckets.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);
/// Seconds. From a quick answer to one that somebody waits for.
const BUCKETS: [f64; 16] = [
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0,
];

const HTTP_REQUESTS: &str = "gozon_http_requests_total";
const HTTP_SECONDS: &str = "gozon_http_request_duration_seconds";
const HTTP_REFUSED: &str = "gozon_http_refused_total";

/// Something that is looked up when it is asked for: how many wait, how old the oldest is.
#[derive(Clone, Debug, PartialEq)]
pub struct Gauge {
    /// Its name.
    pub name: &'static str,
    /// What it is.
    pub help: &'static str,
    /// What tells it from others of its name.
    pub labels: Vec<(&'static str, String)>,
    /// How much.
    pub value: f64,
}

impl From<(&'static str, &'static str, Vec<(&'static str, String)>, f64)> for Gauge {
    fn from(
        (name, help, labels, value): (&'static str, &'static str, Vec<(&'static str, String)>, f64),
    ) -> Self {
        Self {
            name,
            help,
            labels,
            value,
        }
    }
}

type Look = Box<dyn Fn() -> BoxFuture<'static, Result<Vec<Gauge>, String>> + Send + Sync>;

/// What a process shows of itself.
pub struct Metrics {
    service: &'static str,
    version: &'static str,
    looks: Vec<Look>,
}

impl Metrics {
    /// Begins to count.
    pub fn start(service: &'static str, version: &'static str) -> anyhow::Result<Self> {
        recorder()?;
        Ok(Self {
            service,
            version,
            looks: Vec::new(),
        }
        .refusing(&["connections"]))
    }

    /// Names why this process may refuse requests, so that each is shown from the start: a counter that is absent tells
    /// nobody whether nothing was refused or nothing is known.
    #[must_use]
    pub fn refusing(self, reasons: &[&'static str]) -> Self {
        for reason in reasons {
            counter!(HTTP_REFUSED, "reason" => *reason).increment(0);
        }
        self
    }

    /// Looks something up each time the page is asked for. If that fails or takes long, its lines are absent.
    #[must_use]
    pub fn look<F>(mut self, look: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Result<Vec<Gauge>, String>> + Send + 'static,
    {
        self.looks.push(Box::new(move || Box::pin(look())));
        self
    }

    /// The route.
    pub fn routes(self) -> Router {
        Router::new()
            .route("/metrics", get(page))
            .with_state(Arc::new(self))
    }
}

/// One per process, whatever runs in it.
fn recorder() -> anyhow::Result<&'static PrometheusHandle> {
    static RECORDER: OnceLock<Result<PrometheusHandle, BuildError>> = OnceLock::new();
    let recorder = RECORDER.get_or_init(|| {
        let builder = PrometheusBuilder::new()
            .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &BUCKETS)?;
        let handle = builder.install_recorder()?;
        describe_counter!(HTTP_REQUESTS, "HTTP requests answered, by route template");
        describe_histogram!(
            HTTP_SECONDS,
            "From the head of a request to the head of its answer"
        );
        describe_counter!(
            HTTP_REFUSED,
            "HTTP requests refused to keep the rest going, by reason"
        );
        Ok(handle)
    });
    recorder
        .as_ref()
        .map_err(|error| anyhow::anyhow!("metrics cannot be kept: {error}"))
}

/// Keeps durations from piling up where nobody asks for the page.
pub(crate) async fn upkeep() {
    loop {
        tokio::time::sleep(UPKEEP_INTERVAL).await;
        if let Ok(recorder) = recorder() {
            recorder.run_upkeep();
        }
    }
}

/// A request was answered.
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

/// A request was refused to keep the rest going, for a reason that [`Metrics::refusing`] has named.
pub fn refused(reason: &'static str) {
    counter!(HTTP_REFUSED, "reason" => reason).increment(1);
}

async fn page(State(metrics): State<Arc<Metrics>>) -> Response {
    let mut text = recorder().map(PrometheusHandle::render).unwrap_or_default();
    let version = vec![
        ("service", metrics.service.to_owned()),
        ("version", metrics.version.to_owned()),
    ];
    let build = Gauge {
        name: "gozon_build_info",
        help: "Which program this is",
        labels: version,
        value: 1.0,
    };
    let looks = metrics
        .looks
        .iter()
        .map(|look| tokio::time::timeout(LOOK_TIMEOUT, look()));
    let mut gauges = vec![build];
    for looked in join_all(looks).await {
        match looked {
            Ok(Ok(found)) => gauges.extend(found),
            Ok(Err(error)) => warn!(error, "Some metrics could not be looked up"),
            Err(_) => warn!("Some metrics could not be looked up within {LOOK_TIMEOUT:?}"),
        }
    }
    write_gauges(&mut text, gauges);
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

fn write_gauges(text: &mut String, mut gauges: Vec<Gauge>) {
    gauges.sort_by_key(|gauge| gauge.name);
    let mut last = "";
    for Gauge {
        name,
        help,
        labels,
        value,
    } in gauges
    {
        if name != last {
            // Writing to a string cannot fail.
            let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} gauge\n");
        }
        last = name;
        let labels: Vec<String> = labels
            .iter()
            .map(|(name, value)| format!("{name}={value:?}"))
            .collect();
        let _ = match labels.as_slice() {
            [] => writeln!(text, "{name} {value}"),
            labels => writeln!(text, "{name}{{{}}} {value}", labels.join(",")),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gauges_of_one_name_stand_together_under_one_heading() {
        let gauge = |name, label: &str, value| Gauge {
            name,
            help: "h",
            labels: vec![("kind", label.to_owned())],
            value,
        };
        let mut text = String::new();
        let without = Gauge {
            labels: Vec::new(),
            ..gauge("b", "", 0.5)
        };
        write_gauges(
            &mut text,
            vec![gauge("c", "x", 1.0), without, gauge("c", "y", 2.0)],
        );
        assert_eq!(
            text,
            "# HELP b h\n# TYPE b gauge\nb 0.5\n# HELP c h\n# TYPE c gauge\nc{kind=\"x\"} 1\nc{kind=\"y\"} 2\n"
        );
    }
}
