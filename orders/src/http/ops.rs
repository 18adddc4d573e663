//! The operator's view of this service.

use axum::Json;
use axum::extract::{Path, State};
use messaging::desk::{self, DeadLetters, Flow, Replay};
use messaging::{db, topology};
use serde::{Deserialize, Serialize};
use service_kit::Problem;
use service_kit::input::{Cursor, NoParameters, PageLimit, PageQuery, ValidatedQuery};
use service_kit::problem::ProblemDocument;
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use crate::entity;
use crate::error::Error;
use crate::order::{self, Settled};

/// How the flow of this service goes.
#[derive(Serialize, ToSchema)]
#[schema(as = OrdersFlow)]
pub(super) struct FlowBody {
    #[serde(flatten)]
    flow: Flow,
    /// Orders that are not final yet; counts to 100000.
    new_orders: i64,
    /// How long the oldest of them has waited.
    new_oldest_seconds: f64,
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct ReplayQuery {
    /// Only say what would happen
    #[param(nullable = false)]
    dry_run: Option<bool>,
}

/// How the flow goes
#[utoipa::path(
    get,
    path = "/v1/ops/flow",
    operation_id = "getFlow",
    tag = "operators",
    responses(
        (status = 200, description = "What waits, and for how long", body = FlowBody),
        (status = 422, description = "A parameter is not acceptable", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "Temporarily unavailable; send it again", body = ProblemDocument, content_type = "application/problem+json"),
    )
)]
pub(super) async fn flow(
    State(state): State<super::State>,
    _: NoParameters,
) -> Result<Json<FlowBody>, Problem> {
    let read = || desk::flow(&state.db, &state.broker, &topology::ORDERS_PAYMENT_SETTLED);
    let flow = db::read(read).await.map_err(Error::from)?;
    let new = db::read(|| entity::order::new(&state.db))
        .await
        .map_err(Error::from)?;
    Ok(Json(FlowBody {
        flow,
        new_orders: new.number,
        new_oldest_seconds: new.oldest_seconds,
    }))
}

/// Messages that were not applied, newest first
#[utoipa::path(
    get,
    path = "/v1/ops/dead-letters",
    operation_id = "listDeadLetters",
    tag = "operators",
    params(
        PageQuery,
    ),
    responses(
        (status = 200, description = "A page", body = DeadLetters),
        (status = 422, description = "A parameter is not acceptable", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "Temporarily unavailable; send it again", body = ProblemDocument, content_type = "application/problem+json"),
    )
)]
pub(super) async fn dead_letters(
    State(state): State<super::State>,
    ValidatedQuery(query): ValidatedQuery<PageQuery>,
) -> Result<Json<DeadLetters>, Problem> {
    let before = query.cursor.map(Cursor::id);
    let limit = PageLimit::or_default(query.limit);
    let page = db::read(|| desk::dead_letters(&state.db, before, limit as u64)).await;
    Ok(Json(page.map_err(Error::from)?))
}

/// Apply a message again
///
/// Through the same handler, in one transaction. What was applied meanwhile changes nothing; what is refused again goes on
/// waiting. With `dry_run` all is rolled back, and the answer says what would happen.
#[utoipa::path(
    post,
    path = "/v1/ops/dead-letters/{id}/replay",
    operation_id = "replayDeadLetter",
    tag = "operators",
    params(
        ("id" = Uuid, Path, description = "Which dead letter"),
        ReplayQuery,
    ),
    responses(
        (status = 200, description = "What happened, or would happen", body = Replay),
        (status = 404, description = "There is no such dead letter", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 422, description = "A parameter is not acceptable", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "Temporarily unavailable; send it again", body = ProblemDocument, content_type = "application/problem+json"),
    )
)]
pub(super) async fn replay(
    State(state): State<super::State>,
    Path(id): Path<String>,
    ValidatedQuery(query): ValidatedQuery<ReplayQuery>,
) -> Result<Json<Replay>, Problem> {
    let id: Uuid = id.parse().map_err(|_| Error::DeadLetterNotFound)?;
    let dry_run = query.dry_run.unwrap_or_default();
    let replayed = desk::replay(
        &state.db,
        &topology::ORDERS_PAYMENT_SETTLED,
        id,
        dry_run,
        order::settle,
        describe,
    )
    .await;
    let (replay, effect) = replayed
        .map_err(Error::from)?
        .ok_or(Error::DeadLetterNotFound)?;
    if let Some(effect) = effect {
        (state.committed)(effect);
    }
    Ok(Json(replay))
}

fn describe(settled: &Settled) -> Option<String> {
    let ended = settled.ended.first()?;
    Some(match ended.reason {
        None => "The order ends FINISHED.".to_owned(),
        Some(reason) => format!("The order ends CANCELLED: {reason}."),
    })
}
