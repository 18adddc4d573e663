//! The timeline of an order.

use axum::Json;
use axum::extract::{Path, State};
use service_kit::Problem;
use service_kit::input::NoParameters;
use service_kit::problem::ProblemDocument;
use shared_contracts::OrderId;
use shared_contracts::timeline::Timeline;

use crate::error::Error;
use crate::read;

/// The timeline of an order
///
/// Every step with its time, as stored in the databases: placed, published, taken, decided, ended,
/// and every repetition that was ignored. The gateway merges the steps of orders and payments; each
/// service returns only its own.
#[utoipa::path(
    get,
    path = "/v1/orders/{id}/timeline",
    operation_id = "getTimeline",
    tag = "orders",
    params(("id" = String, Path, description = "Id of the order", format = Uuid, example = "01933f3c-7d5a-7b60-9d6f-3f0b4b1f2a11")),
    responses(
        (status = 200, description = "The steps; `missing` names a service that did not answer", body = Timeline),
        (status = 404, description = "There is no such order", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 422, description = "A parameter is not acceptable", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "Temporarily unavailable; send it again", body = ProblemDocument, content_type = "application/problem+json"),
    )
)]
pub(super) async fn get_timeline(
    State(state): State<super::State>,
    Path(id): Path<String>,
    _: NoParameters,
) -> Result<Json<Timeline>, Problem> {
    let id: OrderId = id.parse().map_err(|_| Error::OrderNotFound)?;
    Ok(Json(read::timeline(&state.db, id).await?))
}
