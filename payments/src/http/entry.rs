//! Reading the statement of an account.

use axum::Json;
use axum::extract::{Path, State};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::openapi::{ObjectBuilder, RefOr, Schema, Type};
use utoipa::{IntoParams, PartialSchema, ToSchema};
use uuid::Uuid;

use service_kit::Problem;
use service_kit::input::{PageLimit, ValidatedQuery};
use service_kit::problem::ProblemDocument;

use super::account::path_user_id;
use crate::account;
use crate::entity::transfer::{KIND_DEPOSIT, Model};

/// A movement of money on an account.
#[derive(Serialize, ToSchema)]
#[schema(as = Entry, example = json!({"transfer_id": "01a1fc85-da13-77eb-b00a-cbf551d324a8", "entry_no": 2, "kind": "payment", "amount": -700, "balance_after": 300, "order_id": "01933f3c-7d5a-7b60-9d6f-3f0b4b1f2a11", "created_at": "2026-11-21T10:00:02.500000Z"}))]
pub(super) struct EntryBody {
    transfer_id: Uuid,
    /// Number in the statement, counted from 1.
    entry_no: i64,
    kind: EntryKind,
    /// Minor units; negative for a payment.
    amount: i64,
    balance_after: i64,
    /// The order of a payment; null for a deposit.
    #[schema(required = true)]
    order_id: Option<Uuid>,
    #[serde(serialize_with = "shared_contracts::timestamp::serialize")]
    #[schema(value_type = String, format = DateTime)]
    created_at: OffsetDateTime,
}

#[derive(Clone, Copy, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum EntryKind {
    Deposit,
    Payment,
}

impl From<Model> for EntryBody {
    fn from(transfer: Model) -> Self {
        let (kind, amount) = match transfer.kind.as_str() {
            KIND_DEPOSIT => (EntryKind::Deposit, transfer.amount),
            _ => (EntryKind::Payment, -transfer.amount),
        };
        Self {
            transfer_id: transfer.id,
            entry_no: transfer.entry_no,
            kind,
            amount,
            balance_after: transfer.balance_after,
            order_id: transfer.order_id,
            created_at: transfer.created_at,
        }
    }
}

/// A page of entries, newest first.
#[derive(Serialize, ToSchema)]
#[schema(as = Statement)]
pub(super) struct StatementBody {
    items: Vec<EntryBody>,
    /// The cursor of the next page; null on the last one.
    #[schema(required = true)]
    next_cursor: Option<String>,
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct EntriesQuery {
    /// At most this many entries
    #[param(inline, nullable = false)]
    limit: Option<PageLimit>,
    /// The next_cursor of the page before
    #[param(inline, nullable = false)]
    cursor: Option<EntryCursor>,
}

/// The number of the last entry of a page.
#[derive(Deserialize)]
#[serde(try_from = "String")]
struct EntryCursor(i64);

impl TryFrom<String> for EntryCursor {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        match text.parse() {
            Ok(entry_no @ 1..) => Ok(Self(entry_no)),
            _ => Err("must be the next_cursor of a page"),
        }
    }
}

impl PartialSchema for EntryCursor {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new()
            .schema_type(Type::String)
            .pattern(Some("^[1-9][0-9]{0,17}$"))
            .into()
    }
}

impl ToSchema for EntryCursor {}

/// A statement, newest first
///
/// Every movement of money with the balance after it: the previous balance plus the amount.
#[utoipa::path(
    get,
    path = "/v1/accounts/{user_id}/entries",
    operation_id = "listEntries",
    tag = "accounts",
    params(
        ("user_id" = String, Path, description = "Owner of the account", example = "alice"),
        EntriesQuery,
    ),
    responses(
        (status = 200, description = "A page", body = StatementBody),
        (status = 404, description = "The user has no account", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 422, description = "A parameter is not acceptable", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "Temporarily unavailable; send it again", body = ProblemDocument, content_type = "application/problem+json"),
    )
)]
pub(super) async fn list_entries(
    State(state): State<super::State>,
    Path(user_id): Path<String>,
    ValidatedQuery(query): ValidatedQuery<EntriesQuery>,
) -> Result<Json<StatementBody>, Problem> {
    let user_id = path_user_id(user_id)?;
    let limit = PageLimit::or_default(query.limit);
    let before = query.cursor.map(|EntryCursor(entry_no)| entry_no);
    let (entries, more) = account::statement(&state.db, &user_id, before, limit).await?;
    let next_cursor = entries
        .last()
        .filter(|_| more)
        .map(|entry| entry.entry_no.to_string());
    Ok(Json(StatementBody {
        items: entries.into_iter().map(EntryBody::from).collect(),
        next_cursor,
    }))
}
