//! Operator paths that combine both services. If one is unavailable, the response lists it as
//! unavailable and contains the data of the other.

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::{IntoResponse as _, Response};
use axum::{Extension, Json};
use http_body_util::BodyExt as _;
use serde::Serialize;
use serde_json::Value;
use service_kit::input::{PageLimit, PageQuery, ValidatedQuery};
use service_kit::problem::ProblemDocument;
use utoipa::ToSchema;
use utoipa::openapi::Ref;
use utoipa::openapi::schema::{
    AllOfBuilder, Array, ArrayBuilder, ObjectBuilder, OneOfBuilder, Schema, Type,
};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::client::Client;
use crate::forward::Forwarder;
use crate::service::Service;

const SERVICES: [(Service, &str); 2] =
    [(Service::Orders, "orders"), (Service::Payments, "payments")];

pub(crate) fn api() -> OpenApiRouter<Forwarder> {
    OpenApiRouter::new()
        .routes(routes!(flow))
        .routes(routes!(dead_letters))
        .routes(routes!(replay))
}

/// The state of both services.
#[derive(Serialize, ToSchema)]
#[schema(as = WholeFlow)]
struct FlowBody {
    #[schema(required = true, schema_with = flow_of_orders)]
    orders: Option<Value>,
    #[schema(required = true, schema_with = flow_of_payments)]
    payments: Option<Value>,
    /// Services that are unavailable.
    unavailable: Vec<&'static str>,
}

/// Dead letters of both services, newest first.
#[derive(Serialize, ToSchema)]
#[schema(as = AllDeadLetters)]
struct DeadLettersBody {
    #[schema(schema_with = dead_letters_of_both)]
    items: Vec<Value>,
    /// The cursor of the next page; null on the last one.
    #[schema(required = true)]
    next_cursor: Option<String>,
    /// Services that are unavailable: their dead letters are missing.
    unavailable: Vec<&'static str>,
}

// Schemas that refer to schemas of the services' documents.

fn or_null(name: &str, source: &str) -> Schema {
    OneOfBuilder::new()
        .description(Some(format!("From {source}; null if it is unavailable.")))
        .item(Ref::from_schema_name(name))
        .item(ObjectBuilder::new().schema_type(Type::Null))
        .into()
}

fn flow_of_orders() -> Schema {
    or_null("OrdersFlow", "orders")
}

fn flow_of_payments() -> Schema {
    or_null("Flow", "payments")
}

fn dead_letters_of_both() -> Array {
    let service = ObjectBuilder::new()
        .schema_type(Type::String)
        .enum_values(Some(SERVICES.map(|(_, name)| name)));
    let with_service = ObjectBuilder::new()
        .property("service", service)
        .required("service");
    ArrayBuilder::new()
        .description(Some("Newest first, each with the service that owns it."))
        .items(
            AllOfBuilder::new()
                .item(Ref::from_schema_name("DeadLetter"))
                .item(with_service),
        )
        .build()
}

/// State of the flow
///
/// What waits in each service, for how long, and what its consumer has not processed yet.
#[utoipa::path(
    get,
    path = "/v1/ops/flow",
    operation_id = "getFlow",
    tag = "operators",
    responses(
        (status = 200, description = "Both services, or the one that is available", body = FlowBody),
        (status = 422, description = "A parameter is not acceptable", body = ProblemDocument, content_type = "application/problem+json"),
    )
)]
async fn flow(
    State(forwarder): State<Forwarder>,
    Extension(client): Extension<Client>,
    request: Parts,
) -> Response {
    let Both {
        mut found,
        unavailable,
    } = match ask_both(&forwarder, client, &request).await {
        Ok(both) => both,
        Err(refusal) => return refusal,
    };
    let mut take = |name| {
        found
            .iter()
            .position(|(other, _)| *other == name)
            .map(|index| found.swap_remove(index).1)
    };
    Json(FlowBody {
        orders: take("orders"),
        payments: take("payments"),
        unavailable,
    })
    .into_response()
}

/// Dead letters, newest first
#[utoipa::path(
    get,
    path = "/v1/ops/dead-letters",
    operation_id = "listDeadLetters",
    tag = "operators",
    params(PageQuery),
    responses(
        (status = 200, description = "A page", body = DeadLettersBody),
        (status = 422, description = "A parameter is not acceptable", body = ProblemDocument, content_type = "application/problem+json"),
    )
)]
async fn dead_letters(
    State(forwarder): State<Forwarder>,
    ValidatedQuery(query): ValidatedQuery<PageQuery>,
    Extension(client): Extension<Client>,
    request: Parts,
) -> Response {
    let both = match ask_both(&forwarder, client, &request).await {
        Ok(both) => both,
        Err(refusal) => return refusal,
    };
    let limit = PageLimit::or_default(query.limit);
    Json(merge(both, limit)).into_response()
}

/// Merges a page of each service into one. Ids sort by time, so the newest entries of both pages
/// are the newest entries overall.
fn merge(both: Both, limit: usize) -> DeadLettersBody {
    let mut more = false;
    let mut items: Vec<Value> = Vec::new();
    for (service, mut page) in both.found {
        more |= page["next_cursor"].is_string();
        for mut item in page["items"]
            .as_array_mut()
            .map(std::mem::take)
            .unwrap_or_default()
        {
            item["service"] = service.into();
            items.push(item);
        }
    }
    items.sort_by(|a, b| b["id"].as_str().cmp(&a["id"].as_str()));
    more |= items.len() > limit;
    items.truncate(limit);
    let last = items
        .last()
        .and_then(|item| item["id"].as_str())
        .filter(|_| more);
    let next_cursor = last.map(|id| id.replace('-', ""));
    DeadLettersBody {
        items,
        next_cursor,
        unavailable: both.unavailable,
    }
}

/// Replay a dead letter
///
/// Runs in the service that owns the message, through the same handler, in one transaction. A
/// message that was applied meanwhile changes nothing; one that is refused again keeps waiting.
/// With `dry_run` the transaction is rolled back, and the response says what would happen.
#[utoipa::path(
    post,
    path = "/v1/ops/dead-letters/{id}/replay",
    operation_id = "replayDeadLetter",
    tag = "operators",
    params(
        ("id" = Uuid, Path, description = "Id of the dead letter"),
        ("dry_run" = Option<bool>, Query, description = "Roll back, and say what would happen"),
    ),
    responses(
        (status = 200, description = "What happened, or would happen", body = ref("#/components/schemas/Replay")),
        (status = 404, description = "There is no such dead letter", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 422, description = "A parameter is not acceptable", body = ProblemDocument, content_type = "application/problem+json"),
    )
)]
async fn replay(
    State(forwarder): State<Forwarder>,
    Extension(client): Extension<Client>,
    request: Parts,
) -> Response {
    let mut unavailable = None;
    let mut not_found = None;
    for (service, _) in SERVICES {
        let answer = forwarder
            .clone()
            .forward(service, client, copy_of(&request))
            .await;
        match answer.status() {
            StatusCode::NOT_FOUND => not_found = Some(answer),
            StatusCode::SERVICE_UNAVAILABLE => unavailable = Some(answer),
            _ => return answer,
        }
    }
    // An unavailable service may own the dead letter, so its 503 takes precedence over a 404.
    unavailable
        .or(not_found)
        .unwrap_or_else(|| StatusCode::NOT_FOUND.into_response())
}

struct Both {
    found: Vec<(&'static str, Value)>,
    unavailable: Vec<&'static str>,
}

/// Sends the same request to both services. Returns a response as an error if it is neither 200 nor
/// 503, or if both services return 503.
async fn ask_both(
    forwarder: &Forwarder,
    client: Client,
    request: &Parts,
) -> Result<Both, Response> {
    let [orders, payments] =
        SERVICES.map(|(service, _)| forwarder.clone().forward(service, client, copy_of(request)));
    let (orders, payments) = tokio::join!(orders, payments);
    let mut both = Both {
        found: Vec::new(),
        unavailable: Vec::new(),
    };
    let mut last_unavailable = None;
    for ((_, name), answer) in SERVICES.into_iter().zip([orders, payments]) {
        match answer.status() {
            StatusCode::OK => {
                let body = answer
                    .into_body()
                    .collect()
                    .await
                    .map(|body| body.to_bytes())
                    .unwrap_or_default();
                both.found
                    .push((name, serde_json::from_slice(&body).unwrap_or_default()));
            }
            StatusCode::SERVICE_UNAVAILABLE => {
                both.unavailable.push(name);
                last_unavailable = Some(answer);
            }
            _ => return Err(answer),
        }
    }
    match last_unavailable {
        Some(answer) if both.found.is_empty() => Err(answer),
        _ => Ok(both),
    }
}

/// Copies a request. None of the operator paths has a body.
fn copy_of(request: &Parts) -> Request {
    let mut copy = Request::new(Body::empty());
    *copy.method_mut() = request.method.clone();
    *copy.uri_mut() = request.uri.clone();
    *copy.headers_mut() = request.headers.clone();
    copy
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_pages_of_both_services_are_merged_without_gaps() {
        let page = |ids: &[&str], cursor: Option<&str>| json!({ "items": ids.iter().map(|id| json!({ "id": id })).collect::<Vec<_>>(), "next_cursor": cursor });
        let found = vec![
            ("orders", page(&["9", "3"], Some("3"))),
            ("payments", page(&["8", "7"], None)),
        ];
        let merged = merge(
            Both {
                found,
                unavailable: Vec::new(),
            },
            2,
        );
        let ids: Vec<_> = merged
            .items
            .iter()
            .map(|item| {
                (
                    item["id"].as_str().unwrap(),
                    item["service"].as_str().unwrap(),
                )
            })
            .collect();
        assert_eq!(ids, [("9", "orders"), ("8", "payments")]);
        assert_eq!(
            merged.next_cursor.as_deref(),
            Some("8"),
            "the next page starts with 7 and 3"
        );
        let found = vec![
            ("orders", page(&["3"], None)),
            ("payments", page(&[], None)),
        ];
        assert_eq!(
            merge(
                Both {
                    found,
                    unavailable: Vec::new()
                },
                2
            )
            .next_cursor,
            None
        );
    }
}
