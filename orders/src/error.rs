//! What can go wrong in the use cases of this service.

use messaging::Failure;

#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    #[error("there is no such order")]
    OrderNotFound,
    #[error("the idempotency key was used for another request")]
    KeyReused,
    #[error("too many requests are waiting")]
    Overloaded,
    #[error("the process ended before the answer was known")]
    Stopping,
    #[error(transparent)]
    Database(#[from] Failure),
}
