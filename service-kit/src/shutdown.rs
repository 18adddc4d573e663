//! The end of a process: a graceful shutdown on SIGTERM or Ctrl-C, in bounded time, or one line
//! that says why it cannot run.

use std::fmt;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

/// Time for the graceful shutdown. Orchestrators usually send SIGKILL after 10 s.
const GRACE: Duration = Duration::from_secs(9);

/// Returns a token that the first SIGTERM or SIGINT cancels. A second signal, or the end of the
/// grace period, ends the process at once. That is as safe as kill -9.
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
        info!("Shutting down: finishing work in progress");
        cancelled.cancel();
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            () = tokio::time::sleep(GRACE) => {
                error!("Shutdown took longer than {GRACE:?}: exiting now");
            }
        }
        std::process::exit(1);
    });
    Ok(token)
}

/// The error that `main` returns. Its `Debug`, which Rust prints, is the chain of causes in one
/// line. The `Debug` of anyhow has several lines, and a backtrace if RUST_BACKTRACE is set.
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
