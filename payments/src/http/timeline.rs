//! This service's steps of an order's timeline. The gateway merges them with those of orders.

use axum::Json;
use axum::extract::{Path, State};
use service_kit::Problem;
use service_kit::input::NoParameters;
use service_kit::problem::ProblemDocument;
use shared_contracts::OrderId;
use shared_contracts::timeline::Timeline;

use crate::error::Error;
use crate::timeline;

/// The steps of payments for an order
///
/// Empty if payments does not know the order. The gateway returns the whole timeline.
#[utoipa::path(
    get,
    path = "/v1/payments/{order_id}/timeline",
    operation_id = "getPaymentTimeline",
    tag = "payments",
    params(("order_id" = String, Path, description = "Id of the order", format = Uuid, example = "01933f3c-7d5a-7b60-9d6f-3f0b4b1f2a11")),
    responses(
        (status = 200, description = "The steps of this service", body = Timeline),
        (status = 404, description = "The id is not an order id", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 422, description = "A parameter is not acceptable", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "Temporarily unavailable; send it again", body = ProblemDocument, content_type = "application/problem+json"),
    )
)]
pub(super) async fn get_timeline(
    State(state): State<super::State>,
    Path(order_id): Path<String>,
    _: NoParameters,
) -> Result<Json<Timeline>, Problem> {
    let order_id: OrderId = order_id.parse().map_err(|_| Error::OrderNotFound)?;
    Ok(Json(timeline::timeline(&state.db, order_id).await?))
}
