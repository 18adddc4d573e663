//! The flow status of this service, for operators.

use axum::Json;
use axum::extract::State;
use messaging::FlowStatus;
use service_kit::Problem;
use service_kit::input::NoParameters;
use service_kit::problem::ProblemDocument;

/// Show the status of the event flow
#[utoipa::path(
    get,
    path = "/v1/ops/flow",
    operation_id = "getFlow",
    tag = "operators",
    responses(
        (status = 200, description = "The backlogs and their age", body = FlowStatus),
        (status = 422, description = "A parameter is not acceptable", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "The service cannot answer now; retry", body = ProblemDocument, content_type = "application/problem+json"),
    )
)]
pub(super) async fn get_flow(
    State(state): State<super::State>,
    _: NoParameters,
) -> Result<Json<FlowStatus>, Problem> {
    Ok(Json(state.operators.flow_status().await?))
}
