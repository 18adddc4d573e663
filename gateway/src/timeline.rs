//! The timeline of an order, merged from the halves that orders and payments return.

use axum::extract::{Path, Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::{Extension, Json};
use serde_json::{Value, json};

use service_kit::Problem;
use service_kit::problem::Code;

use crate::client::Client;
use crate::forward::{Forwarder, trace_of};
use crate::service::Service;

/// If payments is unavailable, returns the half of orders, which lists payments as missing. If
/// orders is unavailable, returns its error.
pub(crate) async fn timeline(
    State(forwarder): State<Forwarder>,
    Extension(client): Extension<Client>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Response, Problem> {
    // Only a valid id may be inserted into a path.
    let id: uuid::Uuid = id.parse().map_err(|_| Problem::new(Code::OrderNotFound))?;
    let of_payments = format!("/v1/payments/{id}/timeline");
    let trace = trace_of(request.headers());
    let (orders, payments) = tokio::join!(
        forwarder.clone().forward(Service::Orders, client, request),
        forwarder.read(Service::Payments, client, &of_payments, trace)
    );
    if orders.status() != StatusCode::OK {
        return Ok(orders);
    }
    let whole = axum::body::to_bytes(orders.into_body(), usize::MAX)
        .await
        .ok();
    let whole = whole.and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok());
    let mut whole = whole.ok_or_else(|| Service::Orders.unavailable())?;
    if let Ok(half) = payments {
        merge(&mut whole, half);
    }
    Ok(Json(whole).into_response())
}

/// Merges the steps by time. At equal times, steps of orders come first.
fn merge(whole: &mut Value, mut half: Value) {
    let take = |value: &mut Value| {
        value["steps"]
            .as_array_mut()
            .map(std::mem::take)
            .unwrap_or_default()
    };
    let mut steps = take(whole);
    steps.extend(take(&mut half));
    steps.sort_by_key(time);
    whole["steps"] = Value::Array(steps);
    whole["pruned"] = json!(whole["pruned"] == true || half["pruned"] == true);
    whole["missing"] = json!([]);
}

/// A sortable time. The text itself is not sortable: an older replica may write fewer fraction
/// digits.
fn time(step: &Value) -> (String, String) {
    let text = step["at"]
        .as_str()
        .unwrap_or_default()
        .trim_end_matches('Z');
    let (second, fraction) = text.split_once('.').unwrap_or((text, ""));
    (second.to_owned(), format!("{fraction:0<9}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_steps_of_both_halves_are_sorted_by_time() {
        let step = |service: &str, at: &str| json!({ "service": service, "at": at });
        let mut whole = json!({
            "order_id": "x",
            "steps": [step("orders", "2026-11-21T10:00:00Z"), step("orders", "2026-11-21T10:00:00.25Z"), step("orders", "2026-11-21T10:00:01.1Z")],
            "missing": ["payments"],
            "pruned": false
        });
        let half = json!({ "steps": [step("payments", "2026-11-21T10:00:00.25Z"), step("payments", "2026-11-21T10:00:00.3Z")], "pruned": true });
        merge(&mut whole, half);
        let services: Vec<&str> = whole["steps"]
            .as_array()
            .unwrap()
            .iter()
            .map(|step| step["service"].as_str().unwrap())
            .collect();
        assert_eq!(
            services,
            ["orders", "orders", "payments", "payments", "orders"]
        );
        assert_eq!(
            (&whole["missing"], &whole["pruned"]),
            (&json!([]), &json!(true))
        );
    }
}
