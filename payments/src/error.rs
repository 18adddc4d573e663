//! Errors of the use cases.

use failpoint::Injected;
use messaging::{Failure, Retryable};
use sea_orm::DbErr;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("the user already has an account")]
    AccountExists,
    #[error("the user has no account")]
    AccountNotFound,
    #[error("there is no such order")]
    OrderNotFound,
    #[error("the balance would exceed its limit")]
    BalanceLimit,
    #[error("the idempotency key was used for another request")]
    KeyReused,
    #[error(transparent)]
    Database(#[from] Failure),
}

impl From<DbErr> for Error {
    fn from(error: DbErr) -> Self {
        Self::Database(error.into())
    }
}

impl From<Injected> for Error {
    fn from(injected: Injected) -> Self {
        Self::Database(injected.into())
    }
}

impl Retryable for Error {
    fn into_failure(self) -> Result<Failure, Self> {
        match self {
            Self::Database(failure) => Ok(failure),
            answer => Err(answer),
        }
    }
}
