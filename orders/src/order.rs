//! What can be done with orders.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::time::Instant;

use failpoint::{failpoint, removed};
use sea_orm::{DatabaseConnection, DatabaseTransaction, EntityTrait as _, TransactionTrait as _};
use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use tracing::{debug, info};
use uuid::Uuid;

use messaging::consumer::{Handled, Quarantined, Received};
use messaging::db::{self, Failure, Retry};
use messaging::outbox::{self, Enqueued, Message};
use messaging::outlet::Outlet;
use service_kit::idempotency::Delivery;
use shared_contracts::{
    Amount, EventId, OrderCancelled, OrderFinished, OrderId, OrderPlaced, PaymentOutcome,
    PaymentSettled, UserId,
};

use crate::entity::order::{self, Ending, Filter, Model, Status};
use crate::error::Error;
use crate::measured;

/// An order to place. Its ids are minted before the first try, so that a retry recognises its own row.
#[derive(Clone, Debug)]
pub(crate) struct NewOrder {
    pub(crate) id: OrderId,
    pub(crate) placed_event_id: EventId,
    pub(crate) user_id: UserId,
    pub(crate) amount: Amount,
    pub(crate) description: String,
    pub(crate) idempotency_key: String,
    pub(crate) created_at: OffsetDateTime,
    pub(crate) traceparent: Option<String>,
}

/// An order as it was placed, and whether that happened now.
#[derive(Clone, Debug)]
pub(crate) struct Placed {
    pub(crate) order: Model,
    pub(crate) delivery: Delivery,
}

/// Stores the orders and the facts that they were placed, together or not at all; one refused order does not hurt the
/// others. One order is a slice of one. A key that another transaction is storing right now is not waited for long.
pub(crate) async fn place(
    db: &DatabaseConnection,
    outlet: &Outlet,
    new: &[NewOrder],
) -> Result<Vec<Result<Placed, Error>>, Error> {
    let mut retry = Retry::unless_locked();
    loop {
        if let ControlFlow::Break(settled) = retry.settle(place_once(db, outlet, new)).await {
            return Ok(settled?);
        }
    }
}

async fn place_once(
    db: &DatabaseConnection,
    outlet: &Outlet,
    new: &[NewOrder],
) -> Result<Vec<Result<Placed, Error>>, Failure> {
    let begun = Instant::now();
    failpoint!("place.before_begin").map_err(db::injected)?;
    let txn = db.begin().await?;
    let inserted = order::insert_new(&txn, new.iter().map(Model::from).collect()).await?;
    failpoint!("place.after_orders").map_err(db::injected)?;
    let is_new = |one: &NewOrder| inserted.contains(&one.id.as_uuid());

    // A known key: the order it made, whoever of us or of another process made it.
    let known: Vec<&NewOrder> = new.iter().filter(|one| !is_new(one)).collect();
    let mut by_key: HashMap<(String, String), Model> = HashMap::new();
    if !known.is_empty() {
        let user_ids = known.iter().map(|one| one.user_id.to_string()).collect();
        let keys = known
            .iter()
            .map(|one| one.idempotency_key.clone())
            .collect();
        for row in order::find_by_keys(&txn, user_ids, keys).await? {
            by_key.insert((row.user_id.clone(), row.idempotency_key.clone()), row);
        }
    }
    let messages = new
        .iter()
        .filter(|one| is_new(one) && !removed!("place.outbox_row"))
        .map(|one| {
            Message::first(
                one.placed_event_id,
                &OrderPlaced::from(one),
                one.created_at,
                one.traceparent.as_deref(),
            )
        });
    let enqueued = outbox::enqueue(&txn, messages.collect()).await?;
    failpoint!("place.before_commit").map_err(db::injected)?;
    db::commit(txn).await?;
    measured::placed(inserted.len(), known.len(), begun.elapsed());
    failpoint!("place.after_commit")
        .map_err(|injected| Failure::Unknown(db::injected(injected)))?;
    outlet.hand_over(enqueued);

    Ok(new
        .iter()
        .map(|one| {
            if is_new(one) {
                info!(order.id = %one.id, user.id = %one.user_id, amount = one.amount.minor_units(), "Order placed");
                return Ok(Placed { order: Model::from(one), delivery: Delivery::First });
            }
            // Cloned, not taken: several twins may be in one group.
            match by_key.get(&(one.user_id.to_string(), one.idempotency_key.clone())).cloned() {
                // Our own row, from a try whose commit was not answered.
                Some(row) if row.id == one.id.as_uuid() => Ok(Placed { order: row, delivery: Delivery::First }),
                Some(row) if row.request_hash == request_hash(one) => Ok(Placed { order: row, delivery: Delivery::Replayed }),
                Some(_) => Err(Error::KeyReused),
                None => Err(Error::OrderNotFound),
            }
        })
        .collect())
}

impl From<&NewOrder> for Model {
    fn from(new: &NewOrder) -> Self {
        Self {
            id: new.id.as_uuid(),
            user_id: new.user_id.to_string(),
            amount: new.amount.minor_units(),
            description: new.description.clone(),
            status: Status::New,
            reason: None,
            idempotency_key: if removed!("place.idempotency_key") {
                new.id.to_string()
            } else {
                new.idempotency_key.clone()
            },
            request_hash: request_hash(new),
            placed_event_id: new.placed_event_id.as_uuid(),
            asks: 0,
            asked_at: None,
            settlement_event_id: None,
            final_event_id: None,
            created_at: new.created_at,
            updated_at: new.created_at,
        }
    }
}

impl From<&NewOrder> for OrderPlaced {
    fn from(new: &NewOrder) -> Self {
        Self {
            order_id: new.id,
            user_id: new.user_id.clone(),
            amount: new.amount,
        }
    }
}

/// What makes two requests with one key the same.
fn request_hash(new: &NewOrder) -> Vec<u8> {
    let mut hash = Sha256::new();
    hash.update(new.amount.minor_units().to_be_bytes());
    hash.update((new.user_id.as_str().len() as u64).to_be_bytes());
    hash.update(new.user_id.as_str());
    hash.update(&new.description);
    hash.finalize().to_vec()
}

pub(crate) async fn find(db: &DatabaseConnection, id: OrderId) -> Result<Model, Error> {
    db::read(|| order::Entity::find_by_id(id.as_uuid()).one(db))
        .await?
        .ok_or(Error::OrderNotFound)
}

/// A page of orders, newest first, and whether there are more.
pub(crate) async fn list(
    db: &DatabaseConnection,
    filter: Filter,
    limit: usize,
) -> Result<(Vec<Model>, bool), Error> {
    let mut orders = db::read(|| order::list(db, filter.clone(), limit as u64 + 1)).await?;
    let more = orders.len() > limit;
    orders.truncate(limit);
    Ok((orders, more))
}

/// What [`settle`] did, for whoever waits.
#[derive(Debug, Default)]
pub(crate) struct Settled {
    pub(crate) enqueued: Enqueued,
    pub(crate) ended: Vec<Ended>,
}

/// An order that ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) id: Uuid,
    /// Why it was cancelled; none if it was paid.
    pub(crate) reason: Option<&'static str>,
    /// Since it was placed.
    pub(crate) after: time::Duration,
}

/// Event handler: ends orders as payments decided. The consumer began `txn` and commits it, together with the inbox
/// rows. May run again after a rollback; takes effect once, because only a NEW order is ended.
pub(crate) async fn settle(
    txn: &DatabaseTransaction,
    batch: &[Received<PaymentSettled>],
) -> anyhow::Result<Handled<Settled>> {
    let orders = order::lock(
        txn,
        batch
            .iter()
            .map(|one| one.event.order_id.as_uuid())
            .collect(),
    )
    .await?;
    failpoint!("settle.after_lock")?;
    let (endings, quarantined) = decide(batch, orders);

    let now = db::now();
    let mut messages = Vec::with_capacity(endings.len());
    for (index, ending) in &endings {
        let received = &batch[*index];
        let PaymentSettled {
            order_id,
            user_id,
            amount,
            outcome,
        } = received.event.clone();
        let event_id = EventId::from(ending.final_event_id);
        let traceparent = received.traceparent.as_deref();
        messages.push(match outcome {
            PaymentOutcome::Paid => Message::first(
                event_id,
                &OrderFinished {
                    order_id,
                    user_id,
                    amount,
                },
                now,
                traceparent,
            ),
            PaymentOutcome::Declined { reason } => Message::first(
                event_id,
                &OrderCancelled {
                    order_id,
                    user_id,
                    amount,
                    reason,
                },
                now,
                traceparent,
            ),
        });
        debug!(order.id = %order_id, outcome = outcome.as_str(), "Order settled");
    }
    let endings: Vec<Ending> = endings.into_iter().map(|(_, ending)| ending).collect();
    let ended = endings
        .iter()
        .map(|one| Ended {
            id: one.id,
            reason: one.reason,
            after: now - one.placed_at,
        })
        .collect();
    if !endings.is_empty() {
        let ended = order::end(txn, &endings, now).await?;
        anyhow::ensure!(
            ended == endings.len() as u64,
            "orders that were locked while NEW are not: {ended} of {}",
            endings.len()
        );
    }
    failpoint!("settle.after_end")?;
    let enqueued = outbox::enqueue(txn, messages).await?;
    Ok(Handled {
        quarantined,
        effect: Settled { enqueued, ended },
    })
}

/// Which orders end, each with the place in the batch of the answer that ends it, and which answers contradict what is
/// known. A repetition of what is known is neither.
fn decide(
    batch: &[Received<PaymentSettled>],
    orders: Vec<Model>,
) -> (Vec<(usize, Ending)>, Vec<Quarantined>) {
    let mut orders: HashMap<Uuid, Model> =
        orders.into_iter().map(|order| (order.id, order)).collect();
    let mut endings = Vec::new();
    let mut quarantined = Vec::new();
    for (index, received) in batch.iter().enumerate() {
        let event = &received.event;
        let id = event.order_id.as_uuid();
        let Some(order) = orders.get_mut(&id) else {
            quarantined.push(Quarantined {
                index,
                cause: format!("order {id} is not known here; was this database restored?"),
            });
            continue;
        };
        let same_content =
            order.user_id == event.user_id.as_str() && order.amount == event.amount.minor_units();
        if !same_content && !removed!("settle.same_content") {
            quarantined.push(Quarantined {
                index,
                cause: format!("the answer for order {id} names another user or amount"),
            });
            continue;
        }
        let (status, reason) = match event.outcome {
            PaymentOutcome::Paid => (Status::Finished, None),
            PaymentOutcome::Declined { reason } => (Status::Cancelled, Some(reason.as_str())),
        };
        let status_now = if removed!("settle.status_guard") {
            Status::New
        } else {
            order.status
        };
        match status_now {
            Status::New => {
                order.status = status;
                order.reason = reason.map(str::to_owned);
                let ending = Ending {
                    id,
                    status,
                    reason,
                    placed_at: order.created_at,
                    settlement_event_id: received.event_id.as_uuid(),
                    final_event_id: EventId::mint().as_uuid(),
                };
                endings.push((index, ending));
            }
            _ if order.status == status && order.reason.as_deref() == reason => {}
            Status::Finished | Status::Cancelled => {
                let cause = format!(
                    "order {id} is final with another outcome; {} comes too late",
                    event.outcome.as_str()
                );
                quarantined.push(Quarantined { index, cause });
            }
        }
    }
    (endings, quarantined)
}

#[cfg(test)]
mod tests {
    use shared_contracts::DeclineReason;

    use super::*;

    const PAID: PaymentOutcome = PaymentOutcome::Paid;
    const DECLINED: PaymentOutcome = PaymentOutcome::Declined {
        reason: DeclineReason::InsufficientFunds,
    };

    fn order() -> Model {
        Model::from(&NewOrder {
            id: OrderId::mint(),
            placed_event_id: EventId::mint(),
            user_id: UserId::parse("alice").unwrap(),
            amount: Amount::new(10).unwrap(),
            description: String::new(),
            idempotency_key: "key".to_owned(),
            created_at: OffsetDateTime::UNIX_EPOCH,
            traceparent: None,
        })
    }

    fn answer(order: &Model, outcome: PaymentOutcome) -> Received<PaymentSettled> {
        let event = PaymentSettled {
            order_id: OrderId::from(order.id),
            user_id: UserId::parse(order.user_id.as_str()).unwrap(),
            amount: Amount::new(order.amount).unwrap(),
            outcome,
        };
        Received {
            event,
            event_id: EventId::mint(),
            ask: 0,
            first: true,
            traceparent: None,
        }
    }

    fn statuses(endings: &[(usize, Ending)]) -> Vec<(usize, Status)> {
        endings
            .iter()
            .map(|(index, ending)| (*index, ending.status))
            .collect()
    }

    #[test]
    fn a_new_order_ends_as_payments_decided() {
        let (paid, declined) = (order(), order());
        let batch = [answer(&paid, PAID), answer(&declined, DECLINED)];
        let (endings, quarantined) = decide(&batch, vec![paid, declined]);
        assert_eq!(
            statuses(&endings),
            [(0, Status::Finished), (1, Status::Cancelled)]
        );
        assert_eq!(endings[1].1.reason, Some("insufficient_funds"));
        assert_eq!(quarantined, []);
    }

    #[test]
    fn a_repeated_answer_changes_nothing() {
        let new = order();
        let batch = [answer(&new, PAID), answer(&new, PAID)];
        let (endings, quarantined) = decide(&batch, vec![new.clone()]);
        assert_eq!(
            (statuses(&endings), quarantined),
            (vec![(0, Status::Finished)], vec![])
        );
        let finished = Model {
            status: Status::Finished,
            ..new
        };
        let (endings, quarantined) = decide(&batch, vec![finished]);
        assert_eq!((statuses(&endings), quarantined), (vec![], vec![]));
    }

    #[test]
    fn an_answer_that_contradicts_is_quarantined() {
        let new = order();
        let finished = Model {
            status: Status::Finished,
            ..order()
        };
        let mut dearer = answer(&new, PAID);
        dearer.event.amount = Amount::new(11).unwrap();
        let mut another = answer(&new, PAID);
        another.event.user_id = UserId::parse("bob").unwrap();
        let batch = [
            dearer,
            another,
            answer(&finished, DECLINED),
            answer(&order(), PAID),
            answer(&new, DECLINED),
            answer(&new, PAID),
        ];
        let (endings, quarantined) = decide(&batch, vec![new, finished]);
        assert_eq!(statuses(&endings), [(4, Status::Cancelled)]);
        assert_eq!(
            quarantined.iter().map(|one| one.index).collect::<Vec<_>>(),
            [0, 1, 2, 3, 5]
        );
    }
}
