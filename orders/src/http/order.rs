//! Placing and reading orders.

use std::time::Duration;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::Response;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tokio::time::timeout;
use utoipa::openapi::{ObjectBuilder, RefOr, Schema, Type};
use utoipa::{IntoParams, PartialSchema, ToSchema};
use uuid::Uuid;

use messaging::now;
use service_kit::Problem;
use service_kit::idempotency::IdempotencyKey;
use service_kit::input::key::created;
use service_kit::input::{Cursor, NoParameters, Number, PageLimit, ValidatedJson, ValidatedQuery};
use service_kit::problem::ProblemDocument;
use shared_contracts::{Amount, DeclineReason, EventId, OrderId, UserId};

use crate::entity::order::{Filter, Model, Status};
use crate::error::Error;
use crate::place::NewOrder;
use crate::read;

const DESCRIPTION_CHARACTERS_MAX: usize = 500;

/// An order.
#[derive(Serialize, ToSchema)]
#[schema(as = Order, example = json!({"id": "01933f3c-7d5a-7b60-9d6f-3f0b4b1f2a11", "user_id": "alice", "amount": 700, "description": "A lamp", "status": "NEW", "reason": null, "created_at": "2026-11-21T10:00:00.123456Z", "updated_at": "2026-11-21T10:00:00.123456Z"}))]
pub(super) struct OrderBody {
    id: Uuid,
    user_id: String,
    /// Minor units.
    amount: i64,
    description: String,
    status: OrderStatus,
    /// Why it was cancelled; null if it was not.
    #[schema(required = true, value_type = Option<DeclineReason>)]
    reason: Option<String>,
    #[serde(serialize_with = "shared_contracts::timestamp::serialize")]
    #[schema(value_type = String, format = DateTime)]
    created_at: OffsetDateTime,
    #[serde(serialize_with = "shared_contracts::timestamp::serialize")]
    #[schema(value_type = String, format = DateTime)]
    updated_at: OffsetDateTime,
}

/// NEW until the payment is decided. Then FINISHED (debited once) or CANCELLED (never debited), for
/// ever.
#[derive(Clone, Copy, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "UPPERCASE")]
pub(super) enum OrderStatus {
    New,
    Finished,
    Cancelled,
}

impl From<Status> for OrderStatus {
    fn from(status: Status) -> Self {
        match status {
            Status::New => Self::New,
            Status::Finished => Self::Finished,
            Status::Cancelled => Self::Cancelled,
        }
    }
}

impl From<OrderStatus> for Status {
    fn from(status: OrderStatus) -> Self {
        match status {
            OrderStatus::New => Self::New,
            OrderStatus::Finished => Self::Finished,
            OrderStatus::Cancelled => Self::Cancelled,
        }
    }
}

impl From<Model> for OrderBody {
    fn from(order: Model) -> Self {
        Self {
            id: order.id,
            user_id: order.user_id,
            amount: order.amount,
            description: order.description,
            status: order.status.into(),
            reason: order.reason,
            created_at: order.created_at,
            updated_at: order.updated_at,
        }
    }
}

/// An order to place.
#[derive(Deserialize, ToSchema)]
#[schema(as = NewOrder, example = json!({"user_id": "alice", "amount": 700, "description": "A lamp"}))]
#[serde(deny_unknown_fields)]
pub(super) struct NewOrderBody {
    /// Who pays.
    user_id: UserId,
    /// Minor units.
    amount: Amount,
    /// Free text. Empty if absent.
    #[schema(nullable = false)]
    description: Option<OrderDescription>,
}

#[derive(Default, Deserialize)]
#[serde(try_from = "String")]
struct OrderDescription(String);

impl TryFrom<String> for OrderDescription {
    type Error = String;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        if text.chars().count() > DESCRIPTION_CHARACTERS_MAX {
            return Err(format!(
                "must have at most {DESCRIPTION_CHARACTERS_MAX} characters"
            ));
        }
        // PostgreSQL cannot store this character in a text.
        if text.contains('\0') {
            return Err("must not contain the NUL character".to_owned());
        }
        Ok(Self(text))
    }
}

impl PartialSchema for OrderDescription {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new()
            .schema_type(Type::String)
            .max_length(Some(DESCRIPTION_CHARACTERS_MAX))
            .pattern(Some(r"^[^\u0000]*$"))
            .into()
    }
}

impl ToSchema for OrderDescription {}

type WaitSeconds = Number<0, 30>;

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct Wait {
    /// Seconds to wait until the order is final
    #[param(inline, nullable = false)]
    wait: Option<WaitSeconds>,
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct OrdersQuery {
    /// Only orders of this user; of all users if absent
    #[param(inline, nullable = false, example = "alice")]
    user_id: Option<UserId>,
    /// Only orders in this status
    #[param(nullable = false)]
    status: Option<OrderStatus>,
    /// At most this many entries
    #[param(inline, nullable = false)]
    limit: Option<PageLimit>,
    /// The next_cursor of the page before
    #[param(inline, nullable = false)]
    cursor: Option<Cursor>,
}

/// A page of orders, newest first.
#[derive(Serialize, ToSchema)]
#[schema(as = OrderList)]
pub(super) struct OrderListBody {
    items: Vec<OrderBody>,
    /// The cursor of the next page; null on the last one.
    #[schema(required = true)]
    next_cursor: Option<String>,
}

/// Place an order
///
/// The order is stored at once, and its payment is decided soon after. To see the outcome, read the
/// order with `wait`. The same request with the same Idempotency-Key gets the same response and
/// places no second order.
#[utoipa::path(
    post,
    path = "/v1/orders",
    operation_id = "createOrder",
    tag = "orders",
    params(IdempotencyKey),
    request_body = NewOrderBody,
    responses(
        (status = 201, description = "Placed, now or by an earlier request with this key", body = OrderBody,
         headers(("Location" = String, description = "Path of the order"), ("Idempotency-Replayed" = bool, description = "true if an earlier request placed it")),
         links(
             ("getOrder" = (operation_id = "getOrder", parameters(("id" = "$response.body#/id")))),
             ("getTimeline" = (operation_id = "getTimeline", parameters(("id" = "$response.body#/id")))),
         )),
        (status = 400, description = "The body is not JSON, or the key is malformed", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 409, description = "A request with this key is still being stored; send it again with the same key", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 413, description = "The body is too large", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 415, description = "The body is not application/json", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 422, description = "A field is not acceptable, or the key was used for another request", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "Temporarily unavailable; send it again with the same key", body = ProblemDocument, content_type = "application/problem+json"),
    )
)]
pub(super) async fn create_order(
    State(state): State<super::State>,
    _: NoParameters,
    key: IdempotencyKey,
    headers: HeaderMap,
    ValidatedJson(order): ValidatedJson<NewOrderBody>,
) -> Result<Response, Problem> {
    let new = NewOrder {
        id: OrderId::mint(),
        placed_event_id: EventId::mint(),
        user_id: order.user_id,
        amount: order.amount,
        description: order.description.unwrap_or_default().0,
        idempotency_key: key.as_str().to_owned(),
        created_at: now(),
        traceparent: headers
            .get("traceparent")
            .and_then(|value| traceparent(value.to_str().ok()?)),
    };
    let placed = state.intake.place(new).await?;

    // Always the order as it was placed, so that a replay gets exactly the first response.
    let location = format!("/v1/orders/{}", placed.order.id);
    let updated_at = placed.order.created_at;
    let body = OrderBody {
        status: OrderStatus::New,
        reason: None,
        updated_at,
        ..OrderBody::from(placed.order)
    };
    let mut response = created(placed.execution, body);
    response.headers_mut().insert(
        header::LOCATION,
        HeaderValue::from_str(&location).expect("a UUID is a header value"),
    );
    Ok(response)
}

/// An order
///
/// With `wait`, the response is sent as soon as the order is final, or when the time is over.
#[utoipa::path(
    get,
    path = "/v1/orders/{id}",
    operation_id = "getOrder",
    tag = "orders",
    params(
        ("id" = Uuid, Path, description = "Id of the order"),
        Wait,
    ),
    responses(
        (status = 200, description = "The order", body = OrderBody),
        (status = 404, description = "There is no such order", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 422, description = "A parameter is not acceptable", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "Temporarily unavailable; send it again", body = ProblemDocument, content_type = "application/problem+json"),
    )
)]
pub(super) async fn get_order(
    State(state): State<super::State>,
    Path(id): Path<String>,
    ValidatedQuery(Wait { wait }): ValidatedQuery<Wait>,
) -> Result<Json<OrderBody>, Problem> {
    let id: OrderId = id.parse().map_err(|_| Error::OrderNotFound)?;

    let waiter = state.waiting.register(id.as_uuid());
    let find = async || read::find(&state.db, id).await;
    let mut order = find().await?;
    let seconds = wait.map_or(0, Number::get);
    if order.status != Status::New || seconds == 0 {
        return Ok(Json(order.into()));
    }
    let waited = timeout(
        Duration::from_secs(seconds),
        state.shutdown.run_until_cancelled(waiter.woken()),
    )
    .await;
    match waited {
        Ok(Some(Some(end))) => {
            order.status = end.status;
            order.reason = end.reason.map(str::to_owned);
            order.updated_at = end.at;
            Ok(Json(order.into()))
        }
        // The time is over, the process stops, or another replica made the order final.
        _ => Ok(Json(find().await?.into())),
    }
}

/// Orders, newest first
#[utoipa::path(
    get,
    path = "/v1/orders",
    operation_id = "listOrders",
    tag = "orders",
    params(OrdersQuery),
    responses(
        (status = 200, description = "A page", body = OrderListBody),
        (status = 422, description = "A parameter is not acceptable", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "Temporarily unavailable; send it again", body = ProblemDocument, content_type = "application/problem+json"),
    )
)]
pub(super) async fn list_orders(
    State(state): State<super::State>,
    ValidatedQuery(query): ValidatedQuery<OrdersQuery>,
) -> Result<Json<OrderListBody>, Problem> {
    let filter = Filter {
        user_id: query.user_id.map(String::from),
        status: query.status.map(Status::from),
        before: query.cursor.map(Cursor::id),
    };
    let limit = PageLimit::or_default(query.limit);
    let (orders, more) = read::list(&state.db, filter, limit).await?;
    let next_cursor = orders
        .last()
        .filter(|_| more)
        .map(|order| order.id.simple().to_string());
    Ok(Json(OrderListBody {
        items: orders.into_iter().map(OrderBody::from).collect(),
        next_cursor,
    }))
}

/// Returns a well-formed W3C trace context: 55 characters of lower-case hex and dashes. Drops
/// anything else.
fn traceparent(text: &str) -> Option<String> {
    let lengths: Vec<usize> = text.split('-').map(str::len).collect();
    let hex = text
        .bytes()
        .all(|byte| byte == b'-' || byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
    (hex && lengths == [2, 32, 16, 2]).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_well_formed_trace_context_is_forwarded() {
        let good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        assert_eq!(traceparent(good).as_deref(), Some(good));
        for bad in [
            "",
            "00",
            &good.to_uppercase(),
            &good[1..],
            &format!("{good}-x"),
            "00-4bf92f3577b34da6a3ce929d0e0e473\n-00f067aa0ba902b7-01",
        ] {
            assert_eq!(traceparent(bad), None, "{bad}");
        }
    }
}
