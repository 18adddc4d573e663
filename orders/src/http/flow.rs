//! The flow status of this service, for operators.

use axum::Json;
use axum::extract::State;
use messaging::FlowStatus;
use serde::Serialize;
use service_kit::Problem;
use service_kit::input::NoParameters;
use service_kit::problem::ProblemDocument;
use utoipa::ToSchema;

/// Status of the event flow of orders.
#[derive(Serialize, ToSchema)]
#[schema(as = OrdersFlow)]
pub(super) struct OrdersFlow {
    #[serde(flatten)]
    flow: FlowStatus,
    /// Orders that are not final yet, at the last look for them (every second, or more rarely
    /// while looking is slow). Counted up to 100000.
    new_orders: i64,
    /// Age of the oldest order that is not final.
    new_oldest_seconds: f64,
}

/// Show the status of the event flow
#[utoipa::path(
    get,
    path = "/v1/ops/flow",
    operation_id = "getFlow",
    tag = "operators",
    responses(
        (status = 200, description = "The backlogs and their age", body = OrdersFlow),
        (status = 422, description = "A parameter is not acceptable", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "The service cannot answer now; retry", body = ProblemDocument, content_type = "application/problem+json"),
    )
)]
pub(super) async fn get_flow(
    State(state): State<super::State>,
    _: NoParameters,
) -> Result<Json<OrdersFlow>, Problem> {
    let flow = state.operators.flow_status().await?;
    let unsettled = state.operators.pending_requests().unwrap_or_default();
    Ok(Json(OrdersFlow {
        flow,
        new_orders: unsettled.number,
        new_oldest_seconds: unsettled.oldest_seconds,
    }))
}
