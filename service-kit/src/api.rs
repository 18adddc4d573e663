//! The API of a service: its routes, its OpenAPI document, and Swagger UI.

use axum::Router;
use axum::response::Redirect;
use axum::routing::get;
use utoipa::openapi::{OpenApi, Server};
use utoipa_axum::router::OpenApiRouter;
use utoipa_swagger_ui::SwaggerUi;

use crate::http::edge;
use crate::openapi::complete;
use crate::problem::Code;

/// Builds the OpenAPI document of the routes. `examples` are the problem codes to show as examples.
pub fn document<S>(api: OpenApiRouter<S>, version: &str, examples: &[Code]) -> OpenApi
where
    S: Clone + Send + Sync + 'static,
{
    let mut document = api.into_openapi();
    document.info.version = version.to_owned();
    document.servers = Some(vec![Server::new("/")]);
    complete(&mut document, false, examples);
    document
}

/// `probes` are the routes for monitoring: health and metrics.
pub fn router<S>(api: OpenApiRouter<S>, state: S, document: OpenApi, probes: Router) -> Router
where
    S: Clone + Send + Sync + 'static,
{
    let (api, _) = api.split_for_parts();
    let router = api
        .with_state(state)
        .merge(probes)
        .merge(SwaggerUi::new("/swagger").url("/openapi.json", document))
        .route("/", get(async || Redirect::temporary("/swagger/")));
    edge(router)
}
