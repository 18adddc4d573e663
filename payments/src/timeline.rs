//! The steps of this service in the timeline of an order.

use messaging::{Database, TimelineSteps, read};
use sea_orm::{DbErr, EntityTrait as _};
use shared_contracts::OrderId;
use shared_contracts::timeline::{Step, StepKind, Timeline};

use crate::charge::Charge;
use crate::entity::{payment, transfer};
use crate::error::Error;

const SERVICE: &str = "payments";

pub(crate) async fn timeline(db: &Database, order_id: OrderId) -> Result<Timeline, Error> {
    Ok(read(|| read_timeline(db, order_id)).await?)
}

async fn read_timeline(db: &Database, order_id: OrderId) -> Result<Timeline, DbErr> {
    let order_id = order_id.as_uuid();
    let messages = TimelineSteps {
        db,
        service: SERVICE,
    };
    let mut steps = Vec::new();
    let mut pruned = false;
    if let Some(decision) = payment::Entity::find_by_id(order_id).one(db).await? {
        let received = messages
            .received::<Charge>(decision.request_event_id)
            .await?;
        steps.extend(received);
        let debit = match decision.transfer_id {
            Some(id) => transfer::Entity::find_by_id(id).one(db).await?,
            None => None,
        };
        steps.push(Step {
            outcome: Some(decision.outcome),
            reason: decision.reason,
            balance_after: debit.map(|debit| debit.balance_after),
            ..Step::new(decision.decided_at, SERVICE, StepKind::Decided)
        });
        let sent = messages.sent(decision.event_id).await?;
        pruned = sent.iter().all(|step| step.n != Some(0));
        steps.extend(sent);
    }
    steps.extend(messages.dead_lettered(order_id).await?);
    steps.sort_by_key(|step| step.at);
    Ok(Timeline {
        order_id,
        steps,
        missing: vec!["orders".to_owned()],
        pruned,
    })
}
