//! The only file of this service that maps errors to HTTP.

use service_kit::Problem;
use service_kit::problem::Code;
use shared_contracts::BALANCE_MAX;
use tracing::error;

use crate::error::Error;

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        match error {
            Error::AccountExists => Code::AccountAlreadyExists.into(),
            Error::OrderNotFound => Code::OrderNotFound.into(),
            Error::AccountNotFound => Code::AccountNotFound.into(),
            Error::BalanceLimit => Self::new(Code::BalanceLimitExceeded).because(format!(
                "The balance would exceed {BALANCE_MAX} minor units."
            )),
            Error::KeyReused => Code::IdempotencyKeyReused.into(),
            Error::DeadLetterNotFound => Code::DeadLetterNotFound.into(),
            Error::Database(cause) if messaging::db::is_transient(&cause) => {
                error!(error = %cause, "The database did not answer in time");
                unavailable()
            }
            Error::Database(cause) => {
                error!(error = %cause, "A database query failed");
                Code::InternalError.into()
            }
            Error::OutcomeUnknown(cause) => {
                error!(error = %cause, "The outcome of a transaction is not known");
                unavailable().outcome_unknown()
            }
        }
    }
}

fn unavailable() -> Problem {
    Problem::new(Code::ServiceUnavailable).because("Payments Service temporarily unavailable.")
}
