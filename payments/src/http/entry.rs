//! Statements.

use axum::Json;
use axum::extract::{Path, Query, State};
use serde::Serialize;
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use service_kit::Problem;
use service_kit::body::{self, Fields};
use service_kit::problem::ProblemDocument;

use super::account::path_user_id;
use crate::account;
use crate::entity::transfer::{KIND_DEPOSIT, Model};

/// A movement of money on an account.
#[derive(Serialize, ToSchema)]
#[schema(as = Entry, example = json!({"transfer_id": "01a1fc85-da13-77eb-b00a-cbf551d324a8", "entry_no": 2, "kind": "payment", "amount": -700, "balance_after": 300, "order_id": "01933f3c-7d5a-7b60-9d6f-3f0b4b1f2a11", "created_at": "2026-11-21T10:00:02.5Z"}))]
pub(super) struct EntryBody {
    transfer_id: Uuid,
    /// Its place in the statement, counted from 1.
    entry_no: i64,
    kind: EntryKind,
    /// Minor units; what was paid is negative.
    amount: i64,
    /// The balance after it.
    balance_after: i64,
    /// The order that it paid.
    #[serde(skip_serializing_if = "Option::is_none")]
    order_id: Option<Uuid>,
    #[serde(with = "time::serde::rfc3339")]
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

/// Some entries, newest first.
#[derive(Serialize, ToSchema)]
#[schema(as = Statement)]
pub(super) struct StatementBody {
    items: Vec<EntryBody>,
    /// Ask with it for the next page; null on the last one.
    #[schema(required = true)]
    next_cursor: Option<String>,
}

/// A statement, newest first
///
/// Every movement of money with the balance after it: each is the one before, plus the amount.
#[utoipa::path(
    get,
    path = "/v1/accounts/{user_id}/entries",
    operation_id = "listEntries",
    tag = "accounts",
    params(
        ("user_id" = String, Path, description = "Whose account", example = "alice"),
        ("limit" = Option<u64>, Query, description = "At most so many; 20 if absent", minimum = 1, maximum = 100),
        ("cursor" = Option<String>, Query, description = "next_cursor of the page before", pattern = "^[1-9][0-9]{0,17}$", nullable = false),
    ),
    responses(
        (status = 200, description = "A page", body = StatementBody),
        (status = 404, description = "The user has no account", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 422, description = "A parameter is not acceptable", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "Away; try again", body = ProblemDocument, content_type = "application/problem+json"),
    )
)]
pub(super) async fn list_entries(
    State(state): State<super::State>,
    Path(user_id): Path<String>,
    Query(query): Query<Vec<(String, String)>>,
) -> Result<Json<StatementBody>, Problem> {
    let mut parameters = Fields::from_query(&query);
    let limit = parameters.optional("limit", body::LIMIT_DEFAULT, body::limit);
    let before = parameters.optional("cursor", None, |value| cursor(value).map(Some));
    parameters.finish()?;
    let user_id = path_user_id(user_id)?;
    let limit = limit.unwrap_or(body::LIMIT_DEFAULT);
    let statement = account::statement(&state.db, &user_id, before.flatten(), limit);
    let (entries, more) = statement.await?;
    let next_cursor = entries
        .last()
        .filter(|_| more)
        .map(|entry| entry.entry_no.to_string());
    Ok(Json(StatementBody {
        items: entries.into_iter().map(EntryBody::from).collect(),
        next_cursor,
    }))
}

fn cursor(value: &serde_json::Value) -> Result<i64, String> {
    let rule = "must be the next_cursor of a page";
    body::text(value)?
        .parse()
        .ok()
        .filter(|entry_no| *entry_no > 0)
        .ok_or_else(|| rule.to_owned())
}
