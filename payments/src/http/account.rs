//! Opening and reading accounts.

use axum::Json;
use axum::extract::{Path, State};
use axum::response::Response;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::ToSchema;
use utoipa::openapi::{KnownFormat, ObjectBuilder, SchemaFormat, Type};

use messaging::now;
use service_kit::Problem;
use service_kit::idempotency::IdempotencyKey;
use service_kit::input::key::created;
use service_kit::input::{NoParameters, ValidatedJson};
use service_kit::problem::ProblemDocument;
use shared_contracts::{BALANCE_MAX, UserId};

use crate::account::{self, NewAccount};
use crate::error::Error;

/// An account.
#[derive(Serialize, ToSchema)]
#[schema(as = Account, example = json!({"user_id": "alice", "balance": 0, "currency": "RUB", "created_at": "2026-11-21T10:00:00.123456Z"}))]
pub(super) struct AccountBody {
    user_id: String,
    /// Minor units.
    #[schema(schema_with = balance)]
    balance: i64,
    /// ISO 4217.
    currency: String,
    #[serde(serialize_with = "shared_contracts::timestamp::serialize")]
    #[schema(value_type = String, format = DateTime)]
    created_at: OffsetDateTime,
}

fn balance() -> ObjectBuilder {
    ObjectBuilder::new()
        .schema_type(Type::Integer)
        .format(Some(SchemaFormat::KnownFormat(KnownFormat::Int64)))
        .description(Some("Minor units."))
        .minimum(Some(0))
        .maximum(Some(BALANCE_MAX))
}

/// An account to open.
#[derive(Deserialize, ToSchema)]
#[schema(as = NewAccount, example = json!({"user_id": "alice"}))]
#[serde(deny_unknown_fields)]
pub(super) struct NewAccountBody {
    /// Id of the customer, chosen by the shop.
    user_id: UserId,
}

/// Open an account
///
/// The balance is 0. A user has at most one account. The same request with the same Idempotency-Key
/// gets the same response.
#[utoipa::path(
    post,
    path = "/v1/accounts",
    operation_id = "createAccount",
    tag = "accounts",
    params(IdempotencyKey),
    request_body = NewAccountBody,
    responses(
        (status = 201, description = "Opened, now or by an earlier request with this key", body = AccountBody,
         headers(("Idempotency-Replayed" = bool, description = "true if an earlier request opened it")),
         links(("getAccount" = (operation_id = "getAccount", parameters(("user_id" = "$response.body#/user_id")))),
               ("createDeposit" = (operation_id = "createDeposit", parameters(("user_id" = "$response.body#/user_id")))))),
        (status = 400, description = "The body is not JSON, or the key is malformed", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 409, description = "The user has an account", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 413, description = "The body is too large", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 415, description = "The body is not application/json", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 422, description = "A field is not acceptable", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "Temporarily unavailable; send it again with the same key", body = ProblemDocument, content_type = "application/problem+json"),
    )
)]
pub(super) async fn create_account(
    State(state): State<super::State>,
    _: NoParameters,
    key: IdempotencyKey,
    ValidatedJson(NewAccountBody { user_id }): ValidatedJson<NewAccountBody>,
) -> Result<Response, Problem> {
    let new = NewAccount {
        user_id,
        idempotency_key: key.as_str().to_owned(),
        created_at: now(),
    };
    let (opened, execution) = account::open(&state.writes, &new).await?;
    // Always the account as it was opened, so that a replay gets exactly the first response.
    let body = AccountBody {
        user_id: opened.user_id,
        balance: 0,
        currency: state.currency.to_string(),
        created_at: opened.created_at,
    };
    Ok(created(execution, body))
}

/// An account and its balance
#[utoipa::path(
    get,
    path = "/v1/accounts/{user_id}",
    operation_id = "getAccount",
    tag = "accounts",
    params(("user_id" = String, Path, description = "Owner of the account", example = "alice")),
    responses(
        (status = 200, description = "The account", body = AccountBody),
        (status = 404, description = "The user has no account", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 422, description = "A parameter is not acceptable", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "Temporarily unavailable; send it again", body = ProblemDocument, content_type = "application/problem+json"),
    )
)]
pub(super) async fn get_account(
    State(state): State<super::State>,
    Path(user_id): Path<String>,
    _: NoParameters,
) -> Result<Json<AccountBody>, Problem> {
    let user_id = path_user_id(user_id)?;
    let found = account::find(&state.db, &user_id).await?;
    Ok(Json(AccountBody {
        user_id: found.user_id,
        balance: found.balance,
        currency: state.currency.to_string(),
        created_at: found.created_at,
    }))
}

/// An invalid user id is answered like a user without an account.
pub(super) fn path_user_id(text: String) -> Result<UserId, Error> {
    UserId::parse(text).map_err(|_| Error::AccountNotFound)
}
