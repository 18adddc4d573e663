//! The HTTP API: extract, call, map. No SQL here.

use std::sync::Arc;

use axum::Router;
use axum::extract::FromRef;
use messaging::{Database, OperatorApi};
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use service_kit::problem::Code;

mod account;
mod deposit;
mod entry;
mod error;
mod flow;
mod timeline;

/// Shared by all handlers.
#[derive(Clone)]
pub(crate) struct State {
    /// For requests that read.
    pub(crate) db: Database,
    pub(crate) writes: Database,
    pub(crate) operators: OperatorApi,
    pub(crate) currency: Arc<str>,
}

impl FromRef<State> for OperatorApi {
    fn from_ref(state: &State) -> Self {
        state.operators.clone()
    }
}

#[derive(OpenApi)]
#[openapi(
    info(title = "Gozon payments", description = "Accounts, deposits and balances. Amounts are integers of minor units."),
    tags(
        (name = "accounts", description = "Accounts and the money in them"),
        (name = "payments", description = "Decisions about the payment of orders"),
        (name = "operators", description = "Status of the event flow, and messages that were not applied")
    )
)]
struct Document;

/// Problem codes of this service that the OpenAPI document shows as examples.
const EXAMPLES: [Code; 2] = [Code::AccountNotFound, Code::AccountAlreadyExists];

fn api() -> OpenApiRouter<State> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(account::create_account))
        .routes(routes!(account::get_account))
        .routes(routes!(deposit::create_deposit))
        .routes(routes!(flow::get_flow))
        .routes(routes!(entry::list_entries))
        .routes(routes!(timeline::get_timeline))
        .merge(OperatorApi::routes())
}

pub fn openapi() -> utoipa::openapi::OpenApi {
    service_kit::api::document(api(), env!("CARGO_PKG_VERSION"), &EXAMPLES)
}

pub(crate) fn router(state: State, probes: Router) -> Router {
    service_kit::api::router(api(), state, openapi(), probes)
}
