//! Makes orders final as payments decided.

use std::collections::HashMap;

use failpoint::{failpoint, removed};
use messaging::{
    Begins, Handled, Message, Quarantined, Received, Subscriber, Subscription, Transaction, now,
};
use shared_contracts::{
    Event as _, EventId, OrderCancelled, OrderFinished, PAYMENTS_STREAM, PaymentOutcome,
    PaymentSettled,
};
use tracing::debug;
use uuid::Uuid;

use crate::entity::order::{self, Ending, Model, Status};
use crate::metrics;
use crate::wait::{End, Waiting};

/// Applies the answers of payments.
#[derive(Clone, Default)]
pub struct Settle {
    pub(crate) waiting: Waiting,
}

/// The orders that a batch made final.
#[derive(Debug)]
pub struct Ended(Vec<EndedOrder>);

#[derive(Debug)]
struct EndedOrder {
    id: Uuid,
    end: End,
    /// Time from placing the order to its final status.
    after: time::Duration,
}

impl Subscriber for Settle {
    type Event = PaymentSettled;
    type Effect = Ended;

    const SUBSCRIPTION: Subscription = Subscription {
        consumer: "orders-payment-settled",
        stream: PAYMENTS_STREAM,
        subject: PaymentSettled::SUBJECT,
        service: "orders",
        begins: Begins::Newest,
    };

    /// Takes effect once, because only a NEW order becomes final.
    async fn handle(
        &self,
        txn: &Transaction,
        batch: &[Received<PaymentSettled>],
    ) -> anyhow::Result<Handled<Ended>> {
        let ids = batch.iter().map(|one| one.event.order_id.as_uuid());
        let orders = order::lock(txn, ids.collect()).await?;
        failpoint!("settle.after_lock")?;
        let (endings, quarantined) = decide(batch, orders);

        let at = now();
        let messages = endings.iter().map(|(index, ending)| {
            debug!(order.id = %ending.id, status = ?ending.status, "Order settled");
            // Clients that wait for the order are answered by this process.
            final_event(&batch[*index], ending, at).not_urgent()
        });
        let messages: Vec<Message> = messages.collect();
        let endings: Vec<Ending> = endings.into_iter().map(|(_, ending)| ending).collect();
        if !endings.is_empty() {
            let change = order::end(&endings, at);
            let ended = txn.change_and_enqueue(change, messages).await?.len();
            anyhow::ensure!(
                ended == endings.len(),
                "only {ended} of {} locked orders were still NEW",
                endings.len()
            );
        }
        failpoint!("settle.after_end")?;
        let ended = endings.iter().map(|one| EndedOrder {
            id: one.id,
            end: End {
                status: one.status,
                reason: one.reason,
                at,
            },
            after: at - one.placed_at,
        });
        Ok(Handled {
            effect: Ended(ended.collect()),
            quarantined,
        })
    }

    fn committed(&self, Ended(orders): Ended) {
        for order in &orders {
            metrics::ended(order.end.reason, order.after);
        }
        self.waiting
            .wake(orders.iter().map(|one| (one.id, Some(one.end))));
    }

    fn describe(&self, Ended(orders): &Ended) -> Option<String> {
        Some(match orders.first()?.end.reason {
            None => "The order ends FINISHED.".to_owned(),
            Some(reason) => format!("The order ends CANCELLED: {reason}."),
        })
    }
}

fn final_event(
    received: &Received<PaymentSettled>,
    ending: &Ending,
    at: time::OffsetDateTime,
) -> Message {
    let event_id = EventId::from(ending.final_event_id);
    let traceparent = received.traceparent.as_deref();
    let PaymentSettled {
        order_id,
        user_id,
        amount,
        outcome,
    } = received.event.clone();
    match outcome {
        PaymentOutcome::Paid => {
            let finished = OrderFinished {
                order_id,
                user_id,
                amount,
            };
            Message::new(event_id, &finished, at, traceparent)
        }
        PaymentOutcome::Declined { reason } => {
            let cancelled = OrderCancelled {
                order_id,
                user_id,
                amount,
                reason,
            };
            Message::new(event_id, &cancelled, at, traceparent)
        }
    }
}

/// Returns the orders that become final, each with the index of its answer, and the answers that
/// contradict the stored order. A repeated answer is in neither list.
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
                cause: format!(
                    "there is no order {id} in this database; was it restored from an older backup?"
                ),
            });
            continue;
        };
        let same_content =
            order.user_id == event.user_id.as_str() && order.amount == event.amount.minor_units();
        if !same_content && !removed!("settle.same_content") {
            quarantined.push(Quarantined {
                index,
                cause: format!("the answer about order {id} names another user or amount"),
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
                    "order {id} is already final, with an outcome other than {}",
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
    use shared_contracts::{Amount, DeclineReason, OrderId, UserId};
    use time::OffsetDateTime;

    use super::*;
    use crate::place::NewOrder;

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
