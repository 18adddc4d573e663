//! Health endpoints: `/livez` answers 200 while the process runs, `/readyz` while it can do its
//! work. `/readyz?verbose` lists the checks.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{RawQuery, State};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use futures_util::future::{BoxFuture, join_all};
use tokio_util::sync::CancellationToken;

use crate::problem::{Code, Problem};

const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

type Probe = Box<dyn Fn() -> BoxFuture<'static, Result<(), String>> + Send + Sync>;

struct Check {
    name: &'static str,
    required: bool,
    probe: Probe,
}

/// The health checks of a process.
#[derive(Default)]
pub struct Health(Vec<Check>);

impl Health {
    /// Adds a check that must pass for the process to be ready.
    #[must_use]
    pub fn required<F>(
        self,
        name: &'static str,
        probe: impl Fn() -> F + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = Result<(), String>> + Send + 'static,
    {
        self.check(name, true, probe)
    }

    /// Adds a check whose failure is only shown as degraded. The process stays ready.
    #[must_use]
    pub fn informative<F>(
        self,
        name: &'static str,
        probe: impl Fn() -> F + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = Result<(), String>> + Send + 'static,
    {
        self.check(name, false, probe)
    }

    fn check<F>(
        mut self,
        name: &'static str,
        required: bool,
        probe: impl Fn() -> F + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = Result<(), String>> + Send + 'static,
    {
        self.0.push(Check {
            name,
            required,
            probe: Box::new(move || Box::pin(probe())),
        });
        self
    }

    /// The routes. Once `shutdown` is cancelled the process is not ready, so that a load balancer
    /// sends it no new requests.
    pub fn routes(self, shutdown: CancellationToken) -> Router {
        Router::new()
            .route("/livez", get(async || "ok\n"))
            .route("/readyz", get(readyz))
            .with_state(Arc::new((self, shutdown)))
    }
}

async fn readyz(
    State(state): State<Arc<(Health, CancellationToken)>>,
    RawQuery(query): RawQuery,
) -> Response {
    let (health, shutdown) = &*state;
    let results = join_all(health.0.iter().map(async |check| {
        let result = tokio::time::timeout(PROBE_TIMEOUT, (check.probe)())
            .await
            .unwrap_or_else(|_| Err(format!("no answer within {PROBE_TIMEOUT:?}")));
        (check, result)
    }))
    .await;

    let mut lines = String::new();
    let mut failed = Vec::new();
    if shutdown.is_cancelled() {
        failed.push("the process is shutting down".to_owned());
    }
    for (check, result) in results {
        match result {
            Ok(()) => lines.push_str(&format!("[+] {}: ok\n", check.name)),
            Err(why) if check.required => failed.push(format!("{}: {why}", check.name)),
            Err(why) => lines.push_str(&format!("[~] {}: degraded, {why}\n", check.name)),
        }
    }
    if !failed.is_empty() {
        let cause = format!("The process is not ready ({}).", failed.join("; "));
        return Problem::new(Code::NotReady).because(cause).into_response();
    }
    match query.as_deref() {
        Some("verbose" | "verbose=" | "verbose=true" | "verbose=1") => lines.into_response(),
        _ => "ok\n".into_response(),
    }
}
