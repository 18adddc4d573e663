//! Decides which orders are paid. [`decide`] is a pure function; [`Charge`] is the SQL around it.
//!
//! The decision row is the guard, not the inbox. An order that has one is never decided again, even
//! if the broker repeats, reorders or replays messages and the inbox row is gone.

use std::collections::{BTreeMap, HashMap};

use failpoint::{failpoint, removed};
use messaging::{
    AnswerTable, Begins, Handled, LostRace, Message, Quarantined, Received, Subscriber,
    Subscription, Transaction, now, rearm, sql,
};
use sea_orm::{ConnectionTrait as _, DbErr};
use sha2::{Digest as _, Sha256};
use shared_contracts::{
    Amount, DeclineReason, Event as _, EventId, ORDERS_STREAM, OrderId, OrderPlaced,
    PaymentOutcome, PaymentSettled, UserId,
};
use time::OffsetDateTime;
use tracing::debug;
use uuid::Uuid;

use crate::entity::account::{self, Withdrawal};
use crate::entity::payment::{self, NewDecision, Stored};
use crate::entity::transfer::NewPayment;
use crate::metrics;

/// Decides the payment of orders that were placed.
pub struct Charge;

/// The effect of a batch.
#[derive(Debug)]
pub struct Charged {
    /// `paid` or the decline reason, for each order that was decided.
    outcomes: Vec<&'static str>,
    /// Number of stored decisions that are answered again.
    answered_again: usize,
}

const DECISIONS: AnswerTable = AnswerTable {
    name: "payments",
    key: "order_id",
    last_ask: "last_ask",
};

impl Subscriber for Charge {
    type Event = OrderPlaced;
    type Effect = Charged;

    const SUBSCRIPTION: Subscription = Subscription {
        consumer: "payments-order-placed",
        stream: ORDERS_STREAM,
        subject: OrderPlaced::SUBJECT,
        service: "payments",
        begins: Begins::Newest,
    };

    /// The account, which every order of its user locks.
    fn ordering_key(event: &OrderPlaced) -> String {
        event.user_id.to_string()
    }

    /// Takes effect once, because an order with a decision is never decided again.
    async fn handle(
        &self,
        txn: &Transaction,
        batch: &[Received<OrderPlaced>],
    ) -> anyhow::Result<Handled<Charged>> {
        // Accounts are locked first: if two workers have the same order, the second one reads the
        // decision of the first.
        let user_ids = batch.iter().map(|one| one.event.user_id.to_string());
        let funds = account::lock(txn, user_ids.collect()).await?;
        failpoint!("charge.after_lock")?;
        let accounts: BTreeMap<String, Account> = funds.into_iter().map(Account::of).collect();
        let at = now();
        // A request that is not re-asked is hardly ever decided already. If it is, nothing is
        // stored, and the decisions are read.
        let is_new = batch.iter().all(|one| one.ask == 0);
        let mut decided = if is_new {
            Vec::new()
        } else {
            find_decided(txn, batch).await?
        };
        let mut plan = decide(batch, accounts.clone(), of_orders(&decided));
        let mut is_stored = store(txn, &plan, at).await?;
        if !is_stored && is_new {
            decided = find_decided(txn, batch).await?;
            plan = decide(batch, accounts, of_orders(&decided));
            is_stored = store(txn, &plan, at).await?;
        }
        if !is_stored {
            return Err(lost_race());
        }
        failpoint!("charge.after_store")?;
        let answered_again = answers_again(txn, &plan, &decided, at).await?;
        let effect = Charged {
            outcomes: plan
                .decisions
                .iter()
                .map(|made| outcome_label(made.outcome))
                .collect(),
            answered_again: answered_again.len(),
        };
        txn.enqueue(answered_again).await?;
        Ok(Handled {
            effect,
            quarantined: plan.quarantined,
        })
    }

    fn committed(&self, charged: Charged) {
        for outcome in charged.outcomes {
            metrics::decided(outcome);
        }
        metrics::answered_again(charged.answered_again);
    }

    fn describe(&self, charged: &Charged) -> Option<String> {
        match charged.outcomes.first() {
            Some(&"paid") => Some("The order is paid.".to_owned()),
            Some(reason) => Some(format!("The order is declined: {reason}.")),
            None if charged.answered_again > 0 => {
                Some("The decision does not change; its answer is published again.".to_owned())
            }
            None => None,
        }
    }
}

fn outcome_label(outcome: PaymentOutcome) -> &'static str {
    outcome.reason().map_or("paid", DeclineReason::as_str)
}

fn lost_race() -> anyhow::Error {
    LostRace("a payment decision").into()
}

async fn find_decided(
    txn: &Transaction,
    batch: &[Received<OrderPlaced>],
) -> Result<Vec<payment::Model>, DbErr> {
    let order_ids = batch.iter().map(|one| one.event.order_id.as_uuid());
    let mut decided = payment::find_all(txn, order_ids.collect()).await?;
    if removed!("charge.decision_check") {
        decided.clear();
    }
    if removed!("charge.decision_over_inbox") {
        // The inbox before this transaction decides what is a repetition.
        let event_ids: Vec<Uuid> = batch.iter().map(|one| one.event_id.as_uuid()).collect();
        let query = sql(
            "SELECT event_id FROM inbox
             WHERE event_id = ANY($1::uuid[]) AND xmin <> pg_current_xact_id()::xid",
            [event_ids.into()],
        );
        let rows = txn.query_all_raw(query).await?;
        let known = rows.iter().map(|row| row.try_get("", "event_id"));
        let known: Vec<Uuid> = known.collect::<Result<_, _>>()?;
        let is_repeated = |row: &payment::Model| known.contains(&row.request_event_id);
        decided.retain(is_repeated);
    }
    Ok(decided)
}

fn of_orders(decided: &[payment::Model]) -> HashMap<Uuid, Decided> {
    let decided = decided.iter();
    decided
        .map(|row| (row.order_id, Decided::from(row)))
        .collect()
}

/// Stores decisions and their answers, and moves the money of the orders that are paid. Returns
/// false if nothing was stored, because one of the orders is decided already.
async fn store(txn: &Transaction, plan: &Plan, at: OffsetDateTime) -> anyhow::Result<bool> {
    if plan.decisions.is_empty() {
        return Ok(true);
    }
    let mut rows: Vec<NewDecision> = plan.decisions.iter().map(NewDecision::from).collect();
    if removed!("charge.refusal_stored") {
        rows.retain(|row| row.transfer_id.is_some());
    }
    let decisions = rows.len();
    let withdrawals = plan.withdrawals();
    let change = payment::store(rows, &withdrawals, &plan.payments());
    let answers = plan.decisions.iter().map(|made| made.answer(at)).collect();
    let changed = txn.change_and_enqueue(change, answers).await?;
    let stored = Stored::of(&changed)?;
    if stored.decisions == 0 && decisions > 0 {
        return Ok(false);
    }
    if stored.decisions != decisions {
        // Another worker has decided an order since the statement began: the batch runs again and
        // reads that decision. This can happen only where there is no account to lock.
        return Err(lost_race());
    }
    anyhow::ensure!(
        stored.withdrawals == withdrawals.len(),
        "only {} of {} locked accounts still had enough money",
        stored.withdrawals,
        withdrawals.len()
    );
    Ok(true)
}

/// Re-arms the stored answers of re-asked orders, and returns their messages.
async fn answers_again(
    txn: &Transaction,
    plan: &Plan,
    decided: &[payment::Model],
    at: OffsetDateTime,
) -> anyhow::Result<Vec<Message>> {
    let asks = plan.asked_again.iter().map(|one| (one.order_id, one.ask));
    let rearmed = rearm(txn, &DECISIONS, asks.collect()).await?;
    let mut answers = Vec::new();
    for row in decided.iter().filter(|row| rearmed.contains(&row.order_id)) {
        let asked = plan
            .asked_again
            .iter()
            .find(|one| one.order_id == row.order_id);
        let Some(asked) = asked else { continue };
        let event_id = EventId::from(row.event_id);
        let traceparent = asked.traceparent.as_deref();
        let answer = stored_answer(row)?;
        answers.push(Message::again(
            event_id,
            asked.ask.unsigned_abs(),
            &answer,
            at,
            traceparent,
        ));
    }
    Ok(answers)
}

/// The part of an account that a decision needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Account {
    balance: i64,
    entry_no: i64,
}

impl Account {
    fn of(funds: account::Funds) -> (String, Self) {
        let account = Self {
            balance: funds.balance,
            entry_no: funds.entry_no,
        };
        (funds.user_id, account)
    }
}

/// The part of a stored decision that [`decide`] needs.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Decided {
    request_hash: Vec<u8>,
    last_ask: i32,
}

impl From<&payment::Model> for Decided {
    fn from(row: &payment::Model) -> Self {
        Self {
            request_hash: row.request_hash.clone(),
            last_ask: row.last_ask,
        }
    }
}

/// What [`decide`] decided, and what [`store`] stores.
#[derive(Debug, Default, PartialEq, Eq)]
struct Plan {
    decisions: Vec<Made>,
    asked_again: Vec<AskedAgain>,
    quarantined: Vec<Quarantined>,
}

/// A new decision.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Made {
    request: OrderPlaced,
    request_event_id: EventId,
    ask: i32,
    outcome: PaymentOutcome,
    /// Set if the order is paid.
    payment: Option<NewPayment>,
    event_id: EventId,
    traceparent: Option<String>,
}

impl Made {
    fn answer(&self, at: OffsetDateTime) -> Message {
        debug!(order.id = %self.request.order_id, outcome = self.outcome.as_str(), "Order decided");
        let answer = answer(&self.request, self.outcome);
        Message::new(self.event_id, &answer, at, self.traceparent.as_deref())
    }
}

/// A re-ask of a decided order: its answer may have been lost.
#[derive(Clone, Debug, PartialEq, Eq)]
struct AskedAgain {
    order_id: Uuid,
    ask: i32,
    traceparent: Option<String>,
}

/// Decides orders one after the other, in stream order. Each one can spend what the orders before
/// it have left.
fn decide(
    batch: &[Received<OrderPlaced>],
    mut accounts: BTreeMap<String, Account>,
    mut decided: HashMap<Uuid, Decided>,
) -> Plan {
    let mut plan = Plan::default();
    for (index, received) in batch.iter().enumerate() {
        let request = &received.event;
        let order_id = request.order_id.as_uuid();
        let request_hash = request_hash(request);
        let ask = i32::try_from(received.ask).unwrap_or(i32::MAX);
        match decided.get_mut(&order_id) {
            Some(earlier)
                if earlier.request_hash != request_hash && !removed!("charge.same_request") =>
            {
                let cause = format!(
                    "order {order_id} is decided with another user or amount; this request is not applied"
                );
                plan.quarantined.push(Quarantined { index, cause });
            }
            Some(earlier) => {
                // A redelivery writes nothing. Only a re-ask whose number is not answered yet
                // shows that the answer may be lost. A decision of the same batch needs no second
                // answer.
                if ask > earlier.last_ask {
                    earlier.last_ask = ask;
                    if let Some(made) = plan
                        .decisions
                        .iter_mut()
                        .find(|made| made.request.order_id == request.order_id)
                    {
                        made.ask = ask;
                    } else {
                        plan.asked_again.retain(|again| again.order_id != order_id);
                        plan.asked_again.push(AskedAgain {
                            order_id,
                            ask,
                            traceparent: received.traceparent.clone(),
                        });
                    }
                }
            }
            None => {
                let (outcome, payment) = pay(request, accounts.get_mut(request.user_id.as_str()));
                if !removed!("charge.one_decision_in_a_batch") {
                    decided.insert(
                        order_id,
                        Decided {
                            request_hash,
                            last_ask: ask,
                        },
                    );
                }
                plan.decisions.push(Made {
                    request: request.clone(),
                    request_event_id: received.event_id,
                    ask,
                    outcome,
                    payment,
                    event_id: EventId::mint(),
                    traceparent: received.traceparent.clone(),
                });
            }
        }
    }
    plan
}

fn pay(
    request: &OrderPlaced,
    account: Option<&mut Account>,
) -> (PaymentOutcome, Option<NewPayment>) {
    let declined = |reason| (PaymentOutcome::Declined { reason }, None);
    let Some(account) = account else {
        return declined(DeclineReason::NoAccount);
    };
    let enough = |left: &i64| *left >= 0 || removed!("charge.enough_money");
    let Some(balance_after) = account
        .balance
        .checked_sub(request.amount.minor_units())
        .filter(enough)
    else {
        return declined(DeclineReason::InsufficientFunds);
    };
    account.balance = balance_after;
    account.entry_no += 1;
    let payment = NewPayment {
        id: Uuid::now_v7(),
        user_id: request.user_id.to_string(),
        entry_no: account.entry_no,
        amount: request.amount.minor_units(),
        balance_after,
        order_id: request.order_id.as_uuid(),
    };
    (PaymentOutcome::Paid, Some(payment))
}

impl Plan {
    fn payments(&self) -> Vec<NewPayment> {
        self.decisions
            .iter()
            .filter_map(|made| made.payment.clone())
            .collect()
    }

    /// The total of the payments of each account, sorted by user id.
    fn withdrawals(&self) -> Vec<Withdrawal> {
        let mut by_user: BTreeMap<&str, Withdrawal> = BTreeMap::new();
        for payment in self
            .decisions
            .iter()
            .filter_map(|made| made.payment.as_ref())
        {
            let withdrawal = by_user
                .entry(&payment.user_id)
                .or_insert_with(|| Withdrawal {
                    user_id: payment.user_id.clone(),
                    total: 0,
                    entries: 0,
                });
            // Cannot overflow: the sum is covered by a balance.
            withdrawal.total += payment.amount;
            withdrawal.entries += 1;
        }
        by_user.into_values().collect()
    }
}

impl From<&Made> for NewDecision {
    fn from(made: &Made) -> Self {
        Self {
            order_id: made.request.order_id.as_uuid(),
            user_id: made.request.user_id.to_string(),
            amount: made.request.amount.minor_units(),
            request_hash: request_hash(&made.request),
            outcome: made.outcome.as_str(),
            reason: made.outcome.reason().map(DeclineReason::as_str),
            transfer_id: made.payment.as_ref().map(|payment| payment.id),
            request_event_id: made.request_event_id.as_uuid(),
            event_id: made.event_id.as_uuid(),
            last_ask: made.ask,
        }
    }
}

/// Hash of the fields that must be equal in two requests for the same order.
fn request_hash(request: &OrderPlaced) -> Vec<u8> {
    let mut hash = Sha256::new();
    hash.update(request.order_id.as_uuid().as_bytes());
    hash.update(request.amount.minor_units().to_be_bytes());
    hash.update(request.user_id.as_str());
    hash.finalize().to_vec()
}

fn answer(request: &OrderPlaced, outcome: PaymentOutcome) -> PaymentSettled {
    PaymentSettled {
        order_id: request.order_id,
        user_id: request.user_id.clone(),
        amount: request.amount,
        outcome,
    }
}

/// Rebuilds the first answer from the stored decision.
fn stored_answer(row: &payment::Model) -> anyhow::Result<PaymentSettled> {
    let outcome = PaymentOutcome::parse(&row.outcome, row.reason.as_deref()).ok_or_else(|| {
        anyhow::anyhow!(
            "the stored decision of order {} is invalid: outcome {:?}, reason {:?}",
            row.order_id,
            row.outcome,
            row.reason
        )
    })?;
    Ok(PaymentSettled {
        order_id: OrderId::from(row.order_id),
        user_id: UserId::parse(row.user_id.as_str())?,
        amount: Amount::new(row.amount)?,
        outcome,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(user: &str, amount: i64) -> Received<OrderPlaced> {
        let event = OrderPlaced {
            order_id: OrderId::mint(),
            user_id: UserId::parse(user).unwrap(),
            amount: Amount::new(amount).unwrap(),
        };
        Received {
            event,
            event_id: EventId::mint(),
            ask: 0,
            traceparent: None,
        }
    }

    fn accounts(list: &[(&str, i64)]) -> BTreeMap<String, Account> {
        list.iter()
            .map(|(user, balance)| {
                (
                    (*user).to_owned(),
                    Account {
                        balance: *balance,
                        entry_no: 1,
                    },
                )
            })
            .collect()
    }

    fn outcomes(plan: &Plan) -> Vec<&'static str> {
        plan.decisions
            .iter()
            .map(|made| made.outcome.reason().map_or("paid", DeclineReason::as_str))
            .collect()
    }

    #[test]
    fn orders_are_decided_in_stream_order_against_the_remaining_balance() {
        let batch = [
            request("alice", 70),
            request("alice", 50),
            request("alice", 30),
            request("bob", 1),
            request("carol", 5),
        ];
        let plan = decide(
            &batch,
            accounts(&[("alice", 100), ("bob", 0)]),
            HashMap::new(),
        );
        assert_eq!(
            outcomes(&plan),
            [
                "paid",
                "insufficient_funds",
                "paid",
                "insufficient_funds",
                "no_account"
            ]
        );
        assert_eq!(
            plan.withdrawals(),
            [Withdrawal {
                user_id: "alice".to_owned(),
                total: 100,
                entries: 2
            }]
        );
        let statement: Vec<_> = plan
            .payments()
            .iter()
            .map(|payment| (payment.entry_no, payment.balance_after))
            .collect();
        assert_eq!(statement, [(2, 30), (3, 0)]);
    }

    #[test]
    fn two_events_of_one_order_in_a_batch_are_one_decision() {
        let one = request("alice", 10);
        let two = Received {
            event_id: EventId::mint(),
            ask: 2,
            ..one.clone()
        };
        let plan = decide(&[one, two], accounts(&[("alice", 100)]), HashMap::new());
        assert_eq!(outcomes(&plan), ["paid"]);
        assert_eq!(
            plan.decisions[0].ask, 2,
            "one answer is enough for both requests of the batch"
        );
        assert_eq!(plan.asked_again, []);
    }

    #[test]
    fn only_a_re_ask_with_a_new_number_is_answered_again() {
        let one = request("alice", 10);
        let decided = |last_ask| {
            HashMap::from([(
                one.event.order_id.as_uuid(),
                Decided {
                    request_hash: request_hash(&one.event),
                    last_ask,
                },
            )])
        };
        let answered = |ask, last_ask| {
            let plan = decide(
                &[Received { ask, ..one.clone() }],
                accounts(&[("alice", 100)]),
                decided(last_ask),
            );
            assert_eq!(plan.decisions, []);
            plan.asked_again
                .iter()
                .map(|again| again.ask)
                .collect::<Vec<_>>()
        };
        let none: [i32; 0] = [];
        assert_eq!(answered(0, 0), none);
        assert_eq!(answered(1, 0), [1]);
        assert_eq!(answered(1, 1), none);
        assert_eq!(answered(1, 2), none);
        assert_eq!(answered(3, 2), [3]);
    }

    #[test]
    fn other_content_for_a_decided_order_is_quarantined() {
        let one = request("alice", 10);
        let mut dearer = one.clone();
        dearer.event.amount = Amount::new(11).unwrap();
        let mut another = one.clone();
        another.event.user_id = UserId::parse("bob").unwrap();
        let plan = decide(
            &[one, dearer, another],
            accounts(&[("alice", 100), ("bob", 100)]),
            HashMap::new(),
        );
        assert_eq!(outcomes(&plan), ["paid"]);
        assert_eq!(
            plan.quarantined
                .iter()
                .map(|one| one.index)
                .collect::<Vec<_>>(),
            [1, 2]
        );
        assert_eq!(plan.withdrawals().len(), 1);
    }

    #[test]
    fn money_is_conserved_for_every_mix_of_orders() {
        // All mixes of 4 orders with 3 amounts and 2 users, each with its first order repeated.
        for mix in 0..1296_u32 {
            let mut batch = Vec::new();
            for place in 0..4 {
                let kind = mix / 6_u32.pow(place) % 6;
                batch.push(request(
                    ["alice", "bob"][(kind % 2) as usize],
                    [1, 60, 200][(kind / 2) as usize],
                ));
            }
            batch.push(batch[0].clone());
            let before = accounts(&[("alice", 100), ("bob", 0)]);
            let plan = decide(&batch, before.clone(), HashMap::new());
            assert_eq!(plan.decisions.len(), 4);
            for withdrawal in plan.withdrawals() {
                assert!(
                    withdrawal.total <= before[&withdrawal.user_id].balance,
                    "{mix}"
                );
            }
            let withdrawn: i64 = plan.withdrawals().iter().map(|one| one.total).sum();
            let paid: i64 = plan.payments().iter().map(|one| one.amount).sum();
            assert_eq!(withdrawn, paid, "{mix}");
        }
    }
}
