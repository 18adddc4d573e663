//! Retries transactions after transient errors, for a bounded time.

use std::time::Duration;

use broker::Backoff;
use failpoint::Injected;
use sea_orm::{ConnAcquireErr, DbErr};
use tokio::time::Instant;

use crate::postgres::{is_lock_timeout, is_transient, no_answer};

/// After this time the caller gets an error: nothing was stored, or the outcome is unknown.
const DEADLINE: Duration = Duration::from_secs(5);
const DELAY_MIN: Duration = Duration::from_millis(20);
const DELAY_MAX: Duration = Duration::from_secs(2);
/// Time limit of one attempt.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(3);
/// Minimum time limit of the last attempt.
const ATTEMPT_TIMEOUT_MIN: Duration = Duration::from_secs(1);

/// A transaction that did not succeed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Failure {
    /// Nothing was stored.
    #[error("the database refused the transaction or could not be reached")]
    NotDone(#[from] DbErr),
    /// The connection was lost during COMMIT, and no later attempt could determine whether it
    /// committed.
    #[error("the outcome of the transaction is unknown")]
    Unknown(#[source] DbErr),
}

impl Failure {
    /// Whether the same work can succeed later.
    pub fn is_transient(&self) -> bool {
        let (Self::NotDone(error) | Self::Unknown(error)) = self;
        is_transient(error)
    }

    /// Whether a lock was not granted in time.
    pub fn is_lock_timeout(&self) -> bool {
        let (Self::NotDone(error) | Self::Unknown(error)) = self;
        is_lock_timeout(error)
    }
}

impl From<Injected> for Failure {
    fn from(_: Injected) -> Self {
        Self::NotDone(injected())
    }
}

/// The database error that a failpoint injects.
pub(crate) fn injected() -> DbErr {
    DbErr::ConnectionAcquire(ConnAcquireErr::Timeout)
}

/// An error of a use case: a database failure, or a result that a retry would not change.
pub trait Retryable: From<Failure> {
    fn into_failure(self) -> Result<Failure, Self>;
}

impl Retryable for Failure {
    fn into_failure(self) -> Result<Failure, Self> {
        Ok(self)
    }
}

/// Retries a transaction while its errors are transient, for a bounded time.
///
/// The transaction may run several times, even after a COMMIT whose answer was lost. So it must use
/// ids that were generated before the first attempt, and recognise its own rows. This resolves an
/// unknown commit: the unique index waits for the earlier transaction and shows whether it
/// committed.
pub async fn retry<T, E, F>(attempt: impl FnMut() -> F) -> Result<T, E>
where
    E: Retryable,
    F: Future<Output = Result<T, E>>,
{
    run(attempt, |_| true).await
}

/// Like [`retry`], but returns after a lock timeout, so that the caller need not wait for the lock.
pub async fn retry_unless_locked<T, E, F>(attempt: impl FnMut() -> F) -> Result<T, E>
where
    E: Retryable,
    F: Future<Output = Result<T, E>>,
{
    run(attempt, |error| !is_lock_timeout(error)).await
}

/// Retries a read-only query while its errors are transient, for a bounded time. For example, a
/// connection that the server has closed fails only on its next use.
pub async fn read<T, F>(mut query: impl FnMut() -> F) -> Result<T, Failure>
where
    F: Future<Output = Result<T, DbErr>>,
{
    let attempt = || {
        let query = query();
        async { query.await.map_err(Failure::NotDone) }
    };
    // A read that timed out has changed nothing.
    retry(attempt).await.map_err(|failure| match failure {
        Failure::NotDone(error) | Failure::Unknown(error) => Failure::NotDone(error),
    })
}

async fn run<T, E, F>(
    mut attempt: impl FnMut() -> F,
    may_retry: impl Fn(&DbErr) -> bool,
) -> Result<T, E>
where
    E: Retryable,
    F: Future<Output = Result<T, E>>,
{
    let deadline = Instant::now() + DEADLINE;
    let mut backoff = Backoff::new(DELAY_MIN, DELAY_MAX);
    let mut unknown = false;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let limit = left.clamp(ATTEMPT_TIMEOUT_MIN, ATTEMPT_TIMEOUT);
        let failure = match tokio::time::timeout(limit, attempt()).await {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(error)) => error.into_failure()?,
            Err(_) => Failure::Unknown(no_answer(limit)),
        };
        unknown |= matches!(failure, Failure::Unknown(_));
        let (Failure::NotDone(error) | Failure::Unknown(error)) = failure;
        let pause = backoff.pause();
        let is_over = Instant::now() + pause > deadline;
        if is_over || !is_transient(&error) || !may_retry(&error) {
            // After an unknown commit, a later error does not determine its outcome.
            let failure = match unknown {
                true => Failure::Unknown(error),
                false => Failure::NotDone(error),
            };
            return Err(failure.into());
        }
        tokio::time::sleep(pause).await;
    }
}
