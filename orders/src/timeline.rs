//! What this service did about an order, step by step.

use messaging::db;
use messaging::timeline::{self, Step, StepKind, Timeline};
use messaging::topology::ORDERS_PAYMENT_SETTLED;
use sea_orm::{DatabaseConnection, DbErr, EntityTrait as _};
use shared_contracts::{Event as _, OrderId, PaymentSettled};

use crate::entity::order::{self, Status};
use crate::error::Error;

const SERVICE: &str = "orders";

/// The steps, in the order of time.
pub(crate) async fn of_order(
    db: &DatabaseConnection,
    order_id: OrderId,
) -> Result<Timeline, Error> {
    db::read(|| look(db, order_id))
        .await?
        .ok_or(Error::OrderNotFound)
}

async fn look(db: &DatabaseConnection, order_id: OrderId) -> Result<Option<Timeline>, DbErr> {
    let order_id = order_id.as_uuid();
    let Some(order) = order::Entity::find_by_id(order_id).one(db).await? else {
        return Ok(None);
    };
    let mut steps = vec![Step::new(order.created_at, SERVICE, StepKind::Placed)];
    let sent = timeline::sent(db, SERVICE, order.placed_event_id).await?;
    let mut pruned = sent.is_empty();
    steps.extend(sent);
    if let Some(event_id) = order.settlement_event_id {
        steps.extend(
            timeline::taken(db, &ORDERS_PAYMENT_SETTLED, PaymentSettled::TYPE, event_id).await?,
        );
    }
    if let Some(event_id) = order.final_event_id {
        let outcome = if order.status == Status::Finished {
            "FINISHED"
        } else {
            "CANCELLED"
        };
        steps.push(Step {
            outcome: Some(outcome.to_owned()),
            reason: order.reason,
            ..Step::new(order.updated_at, SERVICE, StepKind::Ended)
        });
        let mut sent = timeline::sent(db, SERVICE, event_id).await?;
        // Of one transaction with the end; the row has the time at which that began.
        if let Some(enqueued) = sent.first_mut() {
            enqueued.at = enqueued.at.max(order.updated_at);
        }
        pruned |= sent.is_empty();
        steps.extend(sent);
    }
    steps.extend(timeline::dead_lettered(db, SERVICE, order_id).await?);
    steps.sort_by_key(|step| step.at);
    Ok(Some(Timeline {
        order_id,
        steps,
        missing: vec!["payments".to_owned()],
        pruned,
    }))
}
