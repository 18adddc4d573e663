//! Errors of the use cases.

use messaging::Failure;

#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    #[error("there is no such order")]
    OrderNotFound,
    #[error("the idempotency key was used for another request")]
    KeyReused,
    #[error("too many requests are waiting")]
    Overloaded,
    #[error("the process stopped before the outcome was known")]
    Stopping,
    #[error(transparent)]
    Database(#[from] Failure),
}
