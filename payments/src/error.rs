//! What can go wrong in this service's use cases, in its own words.

use messaging::db::Failure;
use sea_orm::DbErr;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("the user has an account already")]
    AccountExists,
    #[error("the user has no account")]
    AccountNotFound,
    #[error("there is no such order")]
    OrderNotFound,
    #[error("the balance would exceed its limit")]
    BalanceLimit,
    #[error("the idempotency key was used for another request")]
    KeyReused,
    #[error("there is no such dead letter")]
    DeadLetterNotFound,
    /// Nothing was stored.
    #[error("database query failed")]
    Database(#[from] DbErr),
    /// It may or may not have been stored; the same key tells.
    #[error("the outcome of the transaction is not known")]
    OutcomeUnknown(#[source] DbErr),
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::NotDone(error) => Self::Database(error),
            Failure::Unknown(error) => Self::OutcomeUnknown(error),
        }
    }
}
