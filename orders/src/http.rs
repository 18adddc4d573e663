//! The HTTP API: extract, call, map. No SQL here.

use axum::Router;
use axum::extract::FromRef;
use messaging::{Database, OperatorApi};
use tokio_util::sync::CancellationToken;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use service_kit::problem::Code;

use crate::place::Intake;
use crate::wait::Waiting;

mod error;
mod flow;
mod order;
mod timeline;

/// Shared by all handlers.
#[derive(Clone)]
pub(crate) struct State {
    pub(crate) db: Database,
    pub(crate) operators: OperatorApi,
    pub(crate) intake: Intake,
    pub(crate) waiting: Waiting,
    /// Cancelled when the process stops; then `?wait=` requests are answered at once.
    pub(crate) shutdown: CancellationToken,
}

impl FromRef<State> for OperatorApi {
    fn from_ref(state: &State) -> Self {
        state.operators.clone()
    }
}

#[derive(OpenApi)]
#[openapi(
    info(title = "Gozon orders", description = "Orders and how they ended. Amounts are integers of minor units."),
    tags((name = "orders", description = "Orders: NEW until their payment is decided, then FINISHED or CANCELLED for ever"), (name = "operators", description = "Status of the event flow, and messages that were not applied"))
)]
struct Document;

/// Problem codes of this service that the OpenAPI document shows as examples.
const EXAMPLES: [Code; 2] = [Code::OrderNotFound, Code::RequestInProgress];

fn api() -> OpenApiRouter<State> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(order::create_order, order::list_orders))
        .routes(routes!(order::get_order))
        .routes(routes!(flow::get_flow))
        .routes(routes!(timeline::get_timeline))
        .merge(OperatorApi::routes())
}

pub fn openapi() -> utoipa::openapi::OpenApi {
    service_kit::api::document(api(), env!("CARGO_PKG_VERSION"), &EXAMPLES)
}

pub(crate) fn router(state: State, probes: Router) -> Router {
    service_kit::api::router(api(), state, openapi(), probes)
}
