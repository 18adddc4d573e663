//! The routes: what is forwarded where, and the documents of the API.

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::from_fn_with_state;
use axum::response::Redirect;
use axum::routing::{get, post};
use utoipa::openapi::{InfoBuilder, OpenApi, Server};
use utoipa_swagger_ui::{Config, SwaggerUi, Url};

use crate::cors::{self, Origin};
use crate::forward::{Forwarder, Service};
use crate::limits::{self, Limits};

/// The services' documents, kept beside them and checked against their code by their tests. Compiled in, so that the
/// gateway shows the API whether or not the services are up.
const ORDERS_DOCUMENT: &str = include_str!("../../orders/openapi.json");
const PAYMENTS_DOCUMENT: &str = include_str!("../../payments/openapi.json");

fn document(text: &str) -> OpenApi {
    serde_json::from_str(text).expect("the documents in this repository are OpenAPI; a test reads them")
}

/// The whole API in one document.
pub fn openapi() -> OpenApi {
    let mut all = document(ORDERS_DOCUMENT);
    all.info = InfoBuilder::new()
        .title("Gozon")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some(
            "Orders that are paid exactly once, whatever crashes. Amounts are integers of minor units. Every error is a problem \
             document (RFC 9457). Send an Idempotency-Key with every POST: repeated with the same key, it is done once.",
        ))
        .build();
    all.servers = Some(vec![Server::new("/")]);
    all.merge(document(PAYMENTS_DOCUMENT));
    all
}

/// `probes` are the routes for machines: health, metrics.
pub(crate) fn router(forwarder: Forwarder, limits: Limits, origins: &[Origin], probes: Router) -> Router {
    let swagger = SwaggerUi::new("/swagger")
        .urls(vec![
            (Url::with_primary("all", "/openapi.json", true), openapi()),
            (Url::new("orders", "/openapi/orders.json"), document(ORDERS_DOCUMENT)),
            (Url::new("payments", "/openapi/payments.json"), document(PAYMENTS_DOCUMENT)),
        ])
        .config(Config::default().try_it_out_enabled(true).display_request_duration(true).persist_authorization(true));
    let router = Router::new()
        .route("/v1/orders", get(to_orders).post(to_orders))
        .route("/v1/orders/{id}", get(to_orders))
        .route("/v1/accounts", post(to_payments))
        .route("/v1/accounts/{user_id}", get(to_payments))
        .route("/v1/accounts/{user_id}/deposits", post(to_payments))
        .route_layer(from_fn_with_state(limits, limits::admit))
        .with_state(forwarder)
        .merge(probes)
        .merge(swagger)
        .route("/", get(async || Redirect::temporary("/swagger/")));
    cors::allow(origins, service_kit::http::edge(router))
}

async fn to_orders(State(forwarder): State<Forwarder>, request: Request) -> axum::response::Response {
    forwarder.forward(Service::Orders, request).await
}

async fn to_payments(State(forwarder): State<Forwarder>, request: Request) -> axum::response::Response {
    forwarder.forward(Service::Payments, request).await
}
