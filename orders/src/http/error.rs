//! The only file of this service that maps errors to HTTP.

use service_kit::Problem;
use service_kit::problem::Code;
use tracing::debug;

use crate::error::Error;

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        match error {
            Error::OrderNotFound => Code::OrderNotFound.into(),
            Error::KeyReused => Code::IdempotencyKeyReused.into(),
            Error::Overloaded => {
                // Only at debug level: a line per rejected request would add load. A metric counts
                // them.
                debug!("Request rejected: too many requests are waiting");
                service_kit::metrics::refused("orders_queue");
                Self::new(Code::Overloaded).because("Orders Service temporarily unavailable.")
            }
            Error::Stopping => Self::new(Code::ServiceUnavailable)
                .outcome_unknown()
                .of_service("Orders Service"),
            Error::Database(failure) if failure.is_lock_timeout() => Code::RequestInProgress.into(),
            Error::Database(failure) => Self::from(failure).of_service("Orders Service"),
        }
    }
}
