//! How a process ends: politely on SIGTERM or Ctrl-C, within a bounded time; or with a line that says why it cannot run.

use std::fmt;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

/// After the signal, this long for finishing what was begun. An orchestrator usually kills after 10 s.
const GRACE: Duration = Duration::from_secs(9);

/// A token that the first SIGTERM or SIGINT cancels. A second signal, or a process that does not get done, ends it
/// at once: that is as safe as kill -9, which is safe.
pub fn on_signal() -> std::io::Result<CancellationToken> {
    let token = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let cancelled = token.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        info!("Stopping: finishing what was begun");
        cancelled.cancel();
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            () = tokio::time::sleep(GRACE) => error!("Stopping took longer than {GRACE:?}; ending now"),
        }
        std::process::exit(1);
    });
    Ok(token)
}

/// Why a process ends, for `main` to return. Rust shows it as `Debug`, which with anyhow is many lines, and a backtrace where
/// RUST_BACKTRACE is set; who has mistyped a setting needs the words.
pub struct Failure(anyhow::Error);

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#}", self.0)
    }
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}
