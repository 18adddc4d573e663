//! The only file of this service that knows status codes.

use axum::http::StatusCode;
use service_kit::Problem;
use service_kit::idempotency::IdempotencyKey;
use tracing::{debug, error};

use crate::error::Error;

const UNAVAILABLE: &str = "Orders Service temporarily unavailable.";

/// The answer to a request that was refused or failed. `key` is what the client repeats it with.
pub(super) fn problem(error: Error, key: Option<&IdempotencyKey>) -> Problem {
    match error {
        Error::OrderNotFound => Problem::new(StatusCode::NOT_FOUND, "order_not_found", "There is no order with this id."),
        Error::KeyReused => Problem::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            "idempotency_key_reused",
            "This Idempotency-Key was used for a request with other content, which is not repeated. Use a new key for a new request.",
        ),
        Error::DeadLetterNotFound => {
            Problem::new(StatusCode::NOT_FOUND, "dead_letter_not_found", "There is no dead letter with this id.")
        }
        Error::Overloaded => {
            // As many lines as requests would make it worse; they are counted.
            debug!("A request is turned away: too many wait already");
            service_kit::metrics::refused("orders_queue");
            Problem::overloaded(UNAVAILABLE)
        }
        Error::Stopping => Problem::in_doubt(UNAVAILABLE, key),
        Error::Database(cause) if messaging::db::is_lock_timeout(&cause) => Problem::new(
            StatusCode::CONFLICT,
            "request_in_progress",
            "Another request with this Idempotency-Key is still being stored. Send it again with the same key.",
        )
        .retry_after(1),
        Error::Database(cause) if messaging::db::is_transient(&cause) => {
            error!(error = %cause, "The database did not do it in time");
            Problem::unavailable(UNAVAILABLE)
        }
        Error::Database(cause) => {
            error!(error = %cause, "A database query failed");
            Problem::internal()
        }
        Error::OutcomeUnknown(cause) => {
            error!(error = %cause, "The outcome of a transaction is not known");
            Problem::in_doubt(UNAVAILABLE, key)
        }
    }
}
