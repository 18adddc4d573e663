//! The only file of this service that maps errors to HTTP.

use service_kit::Problem;
use service_kit::problem::Code;
use tracing::{debug, error};

use crate::error::Error;

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        match error {
            Error::OrderNotFound => Code::OrderNotFound.into(),
            Error::KeyReused => Code::IdempotencyKeyReused.into(),
            Error::DeadLetterNotFound => Code::DeadLetterNotFound.into(),
            Error::Overloaded => {
                // One line for each request would add to the load; they are counted.
                debug!("A request is rejected: too many wait already");
                service_kit::metrics::refused("orders_queue");
                unavailable(Code::Overloaded)
            }
            Error::Stopping => unavailable(Code::ServiceUnavailable).outcome_unknown(),
            Error::Database(cause) if messaging::db::is_lock_timeout(&cause) => {
                Code::RequestInProgress.into()
            }
            Error::Database(cause) if messaging::db::is_transient(&cause) => {
                error!(error = %cause, "The database did not answer in time");
                unavailable(Code::ServiceUnavailable)
            }
            Error::Database(cause) => {
                error!(error = %cause, "A database query failed");
                Code::InternalError.into()
            }
            Error::OutcomeUnknown(cause) => {
                error!(error = %cause, "The outcome of a transaction is not known");
                unavailable(Code::ServiceUnavailable).outcome_unknown()
            }
        }
    }
}

fn unavailable(code: Code) -> Problem {
    Problem::new(code).because("Orders Service temporarily unavailable.")
}
