//! The way of one order through a service, told from its tables: what was enqueued, published, taken, taken again, set
//! aside. Each service adds its own steps; whoever shows the whole way puts the services' halves together.

use sea_orm::{
    ColumnTrait as _, DatabaseConnection, DbErr, EntityTrait as _, QueryFilter as _,
    QueryOrder as _,
};
use serde::Serialize;
use serde_json::Value;
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use shared_contracts::header;

use crate::topology::Subscription;
use crate::{dead_letter, inbox, outbox};

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum StepKind {
    /// The order was stored.
    Placed,
    /// A fact was stored together with what it tells about, to be published.
    Enqueued,
    /// The broker acknowledged it.
    Published,
    /// A service took it, in the transaction that holds its effect.
    Taken,
    /// It came again, and changed nothing.
    Repeated,
    /// Payments decided, and debited if it said `paid`.
    Decided,
    /// The order became final.
    Ended,
    /// A message was not applied and waits for a person.
    DeadLettered,
}

/// A fact as it is published.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = TimelineMessage)]
pub struct StepMessage {
    /// Where it is published.
    pub subject: String,
    /// Its headers.
    #[schema(value_type = Object)]
    pub headers: Value,
    /// Its body.
    #[schema(value_type = Object)]
    pub payload: Value,
}

/// A step.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = TimelineStep)]
pub struct Step {
    /// When.
    #[serde(with = "time::serde::rfc3339")]
    #[schema(value_type = String, format = DateTime)]
    pub at: OffsetDateTime,
    /// Where: `orders` or `payments`.
    pub service: &'static str,
    /// What happened.
    pub step: StepKind,
    /// The type of the fact, as in `gozon.order.placed.v1`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub event: Option<String>,
    /// Which fact.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub event_id: Option<Uuid>,
    /// 0 for the first time the fact was said, n for the n-th time it was asked or answered again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n: Option<i32>,
    /// How often publishing was tried, or how often it came again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub times: Option<i32>,
    /// Where the broker stored it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stream_sequence: Option<i64>,
    /// How it was decided, or how the order ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outcome: Option<String>,
    /// Why.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The balance after the debit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balance_after: Option<i64>,
    /// The message itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<StepMessage>,
}

impl Step {
    /// A step of a service's own, with nothing about a message.
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

/// The way of one order, or of the part of it that one service knows.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Timeline {
    /// Which order.
    pub order_id: Uuid,
    /// What happened, in the order of time.
    pub steps: Vec<Step>,
    /// Services whose steps are not among them: they did not answer.
    pub missing: Vec<String>,
    /// Whether steps of the messages are gone, because rows that old are taken away.
    pub pruned: bool,
}

/// How a fact was published: each time it was said. Nothing if its rows were pruned.
pub async fn sent(
    db: &DatabaseConnection,
    service: &'static str,
    event_id: Uuid,
) -> Result<Vec<Step>, DbErr> {
    let rows = outbox::Entity::find()
        .filter(outbox::Column::EventId.eq(event_id))
        .order_by_asc(outbox::Column::N)
        .all(db)
        .await?;
    let mut steps = Vec::new();
    for row in rows {
        let headers: Value =
            serde_json::from_str(&row.headers).unwrap_or(Value::String(row.headers));
        let enqueued = Step {
            event: headers[header::TYPE].as_str().map(str::to_owned),
            event_id: Some(event_id),
            n: Some(row.n),
            ..Step::new(row.created_at, service, StepKind::Enqueued)
        };
        let published = row.published_at.map(|at| Step {
            at,
            step: StepKind::Published,
            times: Some(row.attempts),
            stream_sequence: row.stream_sequence,
            ..enqueued.clone()
        });
        let payload = serde_json::from_str(&row.payload).unwrap_or(Value::String(row.payload));
        steps.push(Step {
            message: Some(StepMessage {
                subject: row.subject,
                headers,
                payload,
            }),
            ..enqueued
        });
        steps.extend(published);
    }
    Ok(steps)
}

/// How a fact was taken, and whether it came again. Nothing if its row was pruned.
pub async fn taken(
    db: &DatabaseConnection,
    subscription: &Subscription,
    event: &'static str,
    event_id: Uuid,
) -> Result<Vec<Step>, DbErr> {
    let key = (subscription.consumer.to_owned(), event_id);
    let Some(row) = inbox::Entity::find_by_id(key).one(db).await? else {
        return Ok(Vec::new());
    };
    let taken = Step {
        event: Some(event.to_owned()),
        event_id: Some(event_id),
        times: Some(row.delivered),
        stream_sequence: Some(row.stream_sequence),
        ..Step::new(row.received_at, subscription.service, StepKind::Taken)
    };
    let repeated = row.last_repeat_at.map(|at| Step {
        at,
        step: StepKind::Repeated,
        times: Some(row.repeats),
        stream_sequence: None,
        ..taken.clone()
    });
    Ok([Some(taken), repeated].into_iter().flatten().collect())
}

/// Messages about an order that were not applied.
pub async fn dead_lettered(
    db: &DatabaseConnection,
    service: &'static str,
    order_id: Uuid,
) -> Result<Vec<Step>, DbErr> {
    let letters = dead_letter::Entity::find()
        .filter(dead_letter::Column::OrderId.eq(order_id))
        .all(db)
        .await?;
    let step = |letter: dead_letter::Model| Step {
        event_id: letter.event_id,
        times: Some(letter.times),
        stream_sequence: Some(letter.stream_sequence),
        outcome: Some(letter.kind),
        reason: Some(letter.cause),
        ..Step::new(letter.created_at, service, StepKind::DeadLettered)
    };
    Ok(letters.into_iter().map(step).collect())
}
