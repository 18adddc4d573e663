//! Reading orders.

use messaging::{Database, TimelineSteps, read};
use sea_orm::{DbErr, EntityTrait as _};
use shared_contracts::OrderId;
use shared_contracts::timeline::{Step, StepKind, Timeline};

use crate::entity::order::{self, Filter, Model, Status};
use crate::error::Error;
use crate::settle::Settle;

const SERVICE: &str = "orders";

pub(crate) async fn find(db: &Database, id: OrderId) -> Result<Model, Error> {
    read(|| order::Entity::find_by_id(id.as_uuid()).one(db))
        .await?
        .ok_or(Error::OrderNotFound)
}

/// A page of orders, newest first, and whether there are more.
pub(crate) async fn list(
    db: &Database,
    filter: Filter,
    limit: usize,
) -> Result<(Vec<Model>, bool), Error> {
    let mut orders = read(|| order::list(db, filter.clone(), limit as u64 + 1)).await?;
    let more = orders.len() > limit;
    orders.truncate(limit);
    Ok((orders, more))
}

/// The steps of this service for an order, sorted by time.
pub(crate) async fn timeline(db: &Database, order_id: OrderId) -> Result<Timeline, Error> {
    read(|| read_timeline(db, order_id))
        .await?
        .ok_or(Error::OrderNotFound)
}

async fn read_timeline(db: &Database, order_id: OrderId) -> Result<Option<Timeline>, DbErr> {
    let order_id = order_id.as_uuid();
    let Some(order) = order::Entity::find_by_id(order_id).one(db).await? else {
        return Ok(None);
    };
    let messages = TimelineSteps {
        db,
        service: SERVICE,
    };
    let mut steps = vec![Step::new(order.created_at, SERVICE, StepKind::Placed)];
    let sent = messages.sent(order.placed_event_id).await?;
    // One row for each request.
    let enqueued = sent.iter().filter(|step| step.step == StepKind::Enqueued);
    let mut pruned = enqueued.count() <= usize::try_from(order.asks).unwrap_or_default();
    steps.extend(sent);
    if let Some(event_id) = order.settlement_event_id {
        let received = messages.received::<Settle>(event_id).await?;
        steps.extend(received);
    }
    if let Some(event_id) = order.final_event_id {
        let outcome = match order.status {
            Status::Finished => "FINISHED",
            Status::New | Status::Cancelled => "CANCELLED",
        };
        steps.push(Step {
            outcome: Some(outcome.to_owned()),
            reason: order.reason,
            ..Step::new(order.updated_at, SERVICE, StepKind::Ended)
        });
        let mut sent = messages.sent(event_id).await?;
        // Stored in the same transaction as the final status, but with the time when it began.
        if let Some(enqueued) = sent.first_mut() {
            enqueued.at = enqueued.at.max(order.updated_at);
        }
        pruned |= sent.is_empty();
        steps.extend(sent);
    }
    steps.extend(messages.dead_lettered(order_id).await?);
    steps.sort_by_key(|step| step.at);
    Ok(Some(Timeline {
        order_id,
        steps,
        missing: vec!["payments".to_owned()],
        pruned,
    }))
}
