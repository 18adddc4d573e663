//! Adding money.

use axum::extract::{Path, State};
use axum::response::Response;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use messaging::now;
use service_kit::Problem;
use service_kit::idempotency::IdempotencyKey;
use service_kit::input::key::created;
use service_kit::input::{NoParameters, ValidatedJson};
use service_kit::problem::ProblemDocument;
use shared_contracts::Amount;

use super::account::path_user_id;
use crate::account::{self, NewDeposit};

/// Money that was added to an account.
#[derive(Serialize, ToSchema)]
#[schema(as = Deposit, example = json!({"transfer_id": "01933f3c-7d5a-7b60-9d6f-3f0b4b1f2a11", "user_id": "alice", "amount": 1000, "balance": 1000, "created_at": "2026-11-21T10:00:00.123456Z"}))]
pub(super) struct DepositBody {
    transfer_id: Uuid,
    user_id: String,
    /// Minor units.
    amount: i64,
    /// Balance right after this deposit, in minor units.
    balance: i64,
    #[serde(serialize_with = "shared_contracts::timestamp::serialize")]
    #[schema(value_type = String, format = DateTime)]
    created_at: OffsetDateTime,
}

/// Money to add.
#[derive(Deserialize, ToSchema)]
#[schema(as = NewDeposit, example = json!({"amount": 1000}))]
#[serde(deny_unknown_fields)]
pub(super) struct NewDepositBody {
    /// Minor units.
    amount: Amount,
}

/// Add money to an account
///
/// The same request with the same Idempotency-Key gets the same response and adds nothing.
#[utoipa::path(
    post,
    path = "/v1/accounts/{user_id}/deposits",
    operation_id = "createDeposit",
    tag = "accounts",
    params(
        ("user_id" = String, Path, description = "Owner of the account", example = "alice"),
        IdempotencyKey,
    ),
    request_body = NewDepositBody,
    responses(
        (status = 201, description = "Added, now or by an earlier request with this key", body = DepositBody,
         headers(("Idempotency-Replayed" = bool, description = "true if an earlier request added it"))),
        (status = 400, description = "The body is not JSON, or the key is malformed", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 404, description = "The user has no account", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 413, description = "The body is too large", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 415, description = "The body is not application/json", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 422, description = "A field is not acceptable, the balance would exceed its limit, or the key was used for another request", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "Temporarily unavailable; send it again with the same key", body = ProblemDocument, content_type = "application/problem+json"),
    )
)]
pub(super) async fn create_deposit(
    State(state): State<super::State>,
    Path(user_id): Path<String>,
    _: NoParameters,
    key: IdempotencyKey,
    ValidatedJson(NewDepositBody { amount }): ValidatedJson<NewDepositBody>,
) -> Result<Response, Problem> {
    let user_id = path_user_id(user_id)?;
    let new = NewDeposit {
        id: Uuid::now_v7(),
        user_id,
        amount,
        idempotency_key: key.as_str().to_owned(),
        created_at: now(),
    };
    let (deposit, execution) = account::top_up(&state.writes, &new).await?;
    let body = DepositBody {
        transfer_id: deposit.id,
        user_id: deposit.user_id,
        amount: deposit.amount,
        balance: deposit.balance_after,
        created_at: deposit.created_at,
    };
    Ok(created(execution, body))
}
