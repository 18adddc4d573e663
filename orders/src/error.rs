//! What can go wrong in this service's use cases, in its own words.

use messaging::db::Failure;
use sea_orm::DbErr;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("there is no such order")]
    OrderNotFound,
    #[error("the idempotency key was used for another request")]
    KeyReused,
    #[error("there is no such dead letter")]
    DeadLetterNotFound,
    #[error("too many requests wait already")]
    Overloaded,
    #[error("the process ended before the answer was known")]
    Stopping,
    /// Nothing was stored.
    #[error("database query failed")]
    Database(#[from] DbErr),
    /// It may or may not have been stored; the same key tells.
    #[error("the outcome of the transaction is not known")]
    OutcomeUnknown(#[source] DbErr),
}

impl Error {
    /// The same for the next in a group that failed together.
    pub(crate) fn again(&self) -> Self {
        match self {
            Self::OrderNotFound => Self::OrderNotFound,
            Self::KeyReused => Self::KeyReused,
            Self::DeadLetterNotFound => Self::DeadLetterNotFound,
            Self::Overloaded => Self::Overloaded,
            Self::Stopping => Self::Stopping,
            Self::Database(error) => Self::Database(error.clone()),
            Self::OutcomeUnknown(error) => Self::OutcomeUnknown(error.clone()),
        }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::NotDone(error) => Self::Database(error),
            Failure::Unknown(error) => Self::OutcomeUnknown(error),
        }
    }
}
