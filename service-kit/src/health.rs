//! `/livez` says that the process runs. `/readyz` says that it can do its work, `?verbose` why or why not.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{RawQuery, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use futures_util::future::{BoxFuture, join_all};
use tokio_util::sync::CancellationToken;

use crate::problem::Problem;

const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

type Probe = Box<dyn Fn() -> BoxFuture<'static, Result<(), String>> + Send + Sync>;

struct Check {
    name: &'static str,
    required: bool,
    probe: Probe,
}

/// What a process looks at to know how it is.
#[derive(Default)]
pub struct Health(Vec<Check>);

impl Health {
    /// Without this the process cannot do its work.
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

    /// Without this it works, but something waits.
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

    /// The two routes. Once `shutdown` is cancelled the process is not ready, so that no new work is sent to it.
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
            .unwrap_or_else(|_| Err("no answer".to_owned()));
        (check, result)
    }))
    .await;

    let mut ready = !shutdown.is_cancelled();
    let mut lines = String::new();
    if !ready {
        lines.push_str("[-] process: stopping\n");
    }
    for (check, result) in results {
        match result {
            Ok(()) => lines.push_str(&format!("[+] {}: ok\n", check.name)),
            Err(why) if check.required => {
                ready = false;
                lines.push_str(&format!("[-] {}: {why}\n", check.name));
            }
            Err(why) => lines.push_str(&format!("[~] {}: degraded, {why}\n", check.name)),
        }
    }
    match (ready, query.as_deref()) {
        (false, _) => Problem::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "not_ready",
            lines.trim_end(),
        )
        .retry_after(1)
        .into_response(),
        (true, Some("verbose" | "verbose=" | "verbose=true" | "verbose=1")) => {
            lines.into_response()
        }
        (true, _) => "ok\n".into_response(),
    }
}
