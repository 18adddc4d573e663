//! Maps database failures to HTTP problem documents.

use service_kit::Problem;
use service_kit::problem::Code;
use tracing::error;

use crate::retry::Failure;

impl From<Failure> for Problem {
    fn from(failure: Failure) -> Self {
        let is_transient = failure.is_transient();
        match failure {
            Failure::NotDone(cause) if is_transient => {
                error!(error = %cause, "The database did not answer in time");
                Code::ServiceUnavailable.into()
            }
            Failure::NotDone(cause) => {
                error!(error = %cause, "A database query failed");
                Code::InternalError.into()
            }
            Failure::Unknown(cause) => {
                error!(error = %cause, "The outcome of a transaction is unknown");
                Self::new(Code::ServiceUnavailable).outcome_unknown()
            }
        }
    }
}
