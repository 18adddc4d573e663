//! What this service did about an order, step by step.

use messaging::db;
use messaging::timeline::{self, Step, StepKind, Timeline};
use messaging::topology::PAYMENTS_ORDER_PLACED;
use sea_orm::{DatabaseConnection, DbErr, EntityTrait as _};
use shared_contracts::{Event as _, OrderId, OrderPlaced};

use crate::entity::{payment, transfer};

const SERVICE: &str = "payments";

/// The steps, in the order of time.
pub(crate) async fn of_order(
    db: &DatabaseConnection,
    order_id: OrderId,
) -> Result<Timeline, DbErr> {
    db::read(|| look(db, order_id)).await
}

async fn look(db: &DatabaseConnection, order_id: OrderId) -> Result<Timeline, DbErr> {
    let order_id = order_id.as_uuid();
    let mut steps = Vec::new();
    let mut pruned = false;
    if let Some(decision) = payment::Entity::find_by_id(order_id).one(db).await? {
        steps.extend(
            timeline::taken(
                db,
                &PAYMENTS_ORDER_PLACED,
                OrderPlaced::TYPE,
                decision.request_event_id,
            )
            .await?,
        );
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
        let sent = timeline::sent(db, SERVICE, decision.event_id).await?;
        pruned = sent.is_empty();
        steps.extend(sent);
    }
    steps.extend(timeline::dead_lettered(db, SERVICE, order_id).await?);
    steps.sort_by_key(|step| step.at);
    Ok(Timeline {
        order_id,
        steps,
        missing: vec!["orders".to_owned()],
        pruned,
    })
}
