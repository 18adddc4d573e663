//! The only file of this service that knows status codes.

use axum::http::StatusCode;
use service_kit::Problem;
use service_kit::idempotency::IdempotencyKey;
use tracing::error;

use crate::error::Error;

const UNAVAILABLE: &str = "Payments Service temporarily unavailable.";

/// The answer to a request that was refused or failed. `key` is what the client repeats it with.
pub(super) fn problem(error: Error, key: Option<&IdempotencyKey>) -> Problem {
    match error {
        Error::AccountExists => Problem::new(
            StatusCode::CONFLICT,
            "account_already_exists",
            "This user has an account already. GET it, or choose another user_id.",
        ),
        Error::OrderNotFound => Problem::new(
            StatusCode::NOT_FOUND,
            "order_not_found",
            "There is no order with this id.",
        ),
        Error::AccountNotFound => Problem::new(
            StatusCode::NOT_FOUND,
            "account_not_found",
            "This user has no account. Create it with POST /v1/accounts.",
        ),
        Error::BalanceLimit => Problem::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            "balance_limit_exceeded",
            format!(
                "The balance would exceed {} minor units. Deposit less.",
                shared_contracts::BALANCE_MAX
            ),
        ),
        Error::KeyReused => Problem::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            "idempotency_key_reused",
            "This Idempotency-Key was used for a request with other content, which is not repeated. Use a new key for a new request.",
        ),
        Error::DeadLetterNotFound => Problem::new(
            StatusCode::NOT_FOUND,
            "dead_letter_not_found",
            "There is no dead letter with this id.",
        ),
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
