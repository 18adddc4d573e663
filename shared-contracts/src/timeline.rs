//! The timeline of an order: what each service did about it, step by step. Each service serves its
//! own half from its database, and the gateway merges them.

use serde::Serialize;
use serde_json::Value;
use time::OffsetDateTime;
use uuid::Uuid;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum StepKind {
    /// The order was stored.
    Placed,
    /// An event was stored in the outbox, in the transaction that made it true.
    Enqueued,
    /// The broker acknowledged the event.
    Published,
    /// A service received the event and applied it, in one transaction.
    Taken,
    /// The event was received again and changed nothing.
    Repeated,
    /// Payments decided; `paid` means debited.
    Decided,
    /// The order became final.
    Ended,
    /// A message was not applied and waits for an operator.
    DeadLettered,
}

/// A message as it is published.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[cfg_attr(feature = "openapi", schema(as = TimelineMessage))]
pub struct StepMessage {
    pub subject: String,
    #[cfg_attr(feature = "openapi", schema(value_type = Object))]
    pub headers: Value,
    #[cfg_attr(feature = "openapi", schema(value_type = Object))]
    pub payload: Value,
}

/// A step in the timeline of an order.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[cfg_attr(feature = "openapi", schema(as = TimelineStep))]
pub struct Step {
    #[serde(serialize_with = "crate::timestamp::serialize")]
    #[cfg_attr(feature = "openapi", schema(value_type = String, format = DateTime))]
    pub at: OffsetDateTime,
    /// `orders` or `payments`.
    pub service: &'static str,
    pub step: StepKind,
    /// The type of the event, for example `gozon.order.placed.v1`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub event: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub event_id: Option<Uuid>,
    /// 0 for the first publication, n for the n-th re-ask or its answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n: Option<i32>,
    /// Attempts to publish it, or repetitions received.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub times: Option<i32>,
    /// Sequence in the stream.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stream_sequence: Option<i64>,
    /// The decision, or the final status of the order.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outcome: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balance_after: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<StepMessage>,
}

impl Step {
    /// Creates a step whose optional fields are empty.
    pub fn new(at: OffsetDateTime, service: &'static str, step: StepKind) -> Self {
        Self {
            at,
            service,
            step,
            event: None,
            event_id: None,
            n: None,
            times: None,
            stream_sequence: None,
            outcome: None,
            reason: None,
            balance_after: None,
            message: None,
        }
    }
}

/// The timeline of an order, or only the steps of one service.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Timeline {
    pub order_id: Uuid,
    /// Ordered by time.
    pub steps: Vec<Step>,
    /// Services that did not answer; their steps are not included.
    pub missing: Vec<String>,
    /// Whether steps are missing because old rows of messages were deleted.
    pub pruned: bool,
}
