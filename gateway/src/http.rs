//! The routes: forwarded paths, the gateway's own operations, API documents and the page.

use axum::extract::{Request, State};
use axum::http::header;
use axum::middleware::from_fn_with_state;
use axum::response::Response;
use axum::routing::{get, post};
use axum::{Extension, Router};
use utoipa_swagger_ui::{Config, SwaggerUi, Url};

use crate::client::Client;
use crate::cors::{self, Origin};
use crate::document;
use crate::events::{self, Events};
use crate::forward::Forwarder;
use crate::limits::{self, Limits};
use crate::ops;
use crate::page;
use crate::problems;
use crate::service::Service;
use crate::timeline;

/// `probes` are the routes for monitoring: health and metrics.
pub(crate) fn router(
    forwarder: Forwarder,
    events: Events,
    limits: Limits,
    origins: &[Origin],
    probes: Router,
) -> Router {
    let swagger = SwaggerUi::new("/swagger")
        .urls(vec![
            (
                Url::with_primary("all", "/openapi.json", true),
                document::all(),
            ),
            (
                Url::new("orders", "/openapi/orders.json"),
                document::orders(),
            ),
            (
                Url::new("payments", "/openapi/payments.json"),
                document::payments(),
            ),
        ])
        .config(
            Config::default()
                .try_it_out_enabled(true)
                .display_request_duration(true)
                .persist_authorization(true),
        );
    let router = Router::new()
        .route("/v1/orders", get(to_orders).post(to_orders))
        .route("/v1/orders/{id}", get(to_orders))
        .route("/v1/orders/{id}/timeline", get(timeline::timeline))
        .route("/v1/accounts", post(to_payments))
        .route("/v1/accounts/{user_id}", get(to_payments))
        .route("/v1/accounts/{user_id}/deposits", post(to_payments))
        .route("/v1/accounts/{user_id}/entries", get(to_payments))
        .with_state(forwarder.clone())
        .merge(ops::api().with_state(forwarder).split_for_parts().0)
        .merge(events::api().with_state(events).split_for_parts().0)
        .merge(problems::api().split_for_parts().0)
        .route_layer(from_fn_with_state(limits, limits::admit))
        .merge(probes)
        .merge(swagger)
        .route(
            "/openapi.yaml",
            get(async || {
                (
                    [(header::CONTENT_TYPE, "application/yaml")],
                    document::yaml(),
                )
            }),
        )
        .merge(page::routes());
    cors::allow(origins, service_kit::http::edge(router))
}

async fn to_orders(
    State(forwarder): State<Forwarder>,
    Extension(client): Extension<Client>,
    request: Request,
) -> Response {
    forwarder.forward(Service::Orders, client, request).await
}

async fn to_payments(
    State(forwarder): State<Forwarder>,
    Extension(client): Extension<Client>,
    request: Request,
) -> Response {
    forwarder.forward(Service::Payments, client, request).await
}
