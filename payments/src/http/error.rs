//! The only file of this service that maps errors to HTTP.

use service_kit::Problem;
use service_kit::problem::Code;
use shared_contracts::BALANCE_MAX;

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
            Error::Database(failure) => Self::from(failure).of_service("Payments Service"),
        }
    }
}
