//! Decisions: how the payment of each order ended. One row per order, never deleted.

use messaging::{Transaction, sql};
use sea_orm::entity::prelude::*;
use sea_orm::{QueryResult, Statement};

use crate::entity::account::Withdrawal;
use crate::entity::transfer::{KIND_PAYMENT, NewPayment, SHOP};

#[sea_orm::model]
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "payments")]
pub struct Model {
    #[sea_orm(primary_key, auto_increment = false)]
    pub order_id: Uuid,
    pub user_id: String,
    pub amount: i64,
    /// Hash of the request. The same order with another hash is a contradiction.
    pub request_hash: Vec<u8>,
    /// `paid` or `declined`.
    pub outcome: String,
    pub reason: Option<String>,
    pub transfer_id: Option<Uuid>,
    /// The `OrderPlaced` event that was decided.
    pub request_event_id: Uuid,
    /// The `PaymentSettled` event: the same id each time it is published.
    pub event_id: Uuid,
    /// Number of the newest re-ask that was answered.
    pub last_ask: i32,
    pub decided_at: TimeDateTimeWithTimeZone,
}

impl ActiveModelBehavior for ActiveModel {}

pub(crate) async fn find_all(txn: &Transaction, order_ids: Vec<Uuid>) -> Result<Vec<Model>, DbErr> {
    Entity::find()
        .filter(Column::OrderId.eq_any(order_ids))
        .all(txn)
        .await
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NewDecision {
    pub(crate) order_id: Uuid,
    pub(crate) user_id: String,
    pub(crate) amount: i64,
    pub(crate) request_hash: Vec<u8>,
    pub(crate) outcome: &'static str,
    pub(crate) reason: Option<&'static str>,
    pub(crate) transfer_id: Option<Uuid>,
    pub(crate) request_event_id: Uuid,
    pub(crate) event_id: Uuid,
    pub(crate) last_ask: i32,
}

/// How many decisions and withdrawals a [`store`] has stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Stored {
    pub(crate) decisions: usize,
    pub(crate) withdrawals: usize,
}

/// A change that stores decisions and moves the money of the orders that are paid: all of it, or
/// nothing if one of the orders is decided already. One statement, because each one costs a round
/// trip, and a lone order would need four. The rows are sorted, so that workers with overlapping
/// orders wait for each other instead of deadlocking.
///
/// The statement checks the balance, although the caller has locked the account and has checked it
/// already. If one of these two guards is wrong, the other one still holds.
pub(crate) fn store(
    mut decisions: Vec<NewDecision>,
    withdrawals: &[Withdrawal],
    payments: &[NewPayment],
) -> Statement {
    decisions.sort_by_key(|decision| decision.order_id);
    let mut order_ids = Vec::with_capacity(decisions.len());
    let mut user_ids = Vec::with_capacity(decisions.len());
    let mut amounts = Vec::with_capacity(decisions.len());
    let mut hashes = Vec::with_capacity(decisions.len());
    let mut outcomes: Vec<String> = Vec::with_capacity(decisions.len());
    let mut reasons: Vec<String> = Vec::with_capacity(decisions.len());
    let mut transfer_ids = Vec::with_capacity(decisions.len());
    let mut request_event_ids = Vec::with_capacity(decisions.len());
    let mut event_ids = Vec::with_capacity(decisions.len());
    let mut asks = Vec::with_capacity(decisions.len());
    for decision in decisions {
        order_ids.push(decision.order_id);
        user_ids.push(decision.user_id);
        amounts.push(decision.amount);
        hashes.push(decision.request_hash);
        outcomes.push(decision.outcome.to_owned());
        // The driver's arrays cannot contain NULL: an empty reason and a nil UUID mean none.
        reasons.push(decision.reason.unwrap_or_default().to_owned());
        transfer_ids.push(decision.transfer_id.unwrap_or_default());
        request_event_ids.push(decision.request_event_id);
        event_ids.push(decision.event_id);
        asks.push(decision.last_ask);
    }
    let withdrawn_from: Vec<String> = withdrawals.iter().map(|one| one.user_id.clone()).collect();
    let totals: Vec<i64> = withdrawals.iter().map(|one| one.total).collect();
    let entries: Vec<i64> = withdrawals.iter().map(|one| one.entries).collect();
    let ids: Vec<Uuid> = payments.iter().map(|one| one.id).collect();
    let payers: Vec<String> = payments.iter().map(|one| one.user_id.clone()).collect();
    let entry_nos: Vec<i64> = payments.iter().map(|one| one.entry_no).collect();
    let paid: Vec<i64> = payments.iter().map(|one| one.amount).collect();
    let balances: Vec<i64> = payments.iter().map(|one| one.balance_after).collect();
    let paid_orders: Vec<Uuid> = payments.iter().map(|one| one.order_id).collect();
    sql(
        "decided AS (
             INSERT INTO payments (order_id, user_id, amount, request_hash, outcome, reason, transfer_id, request_event_id,
                                   event_id, last_ask)
             SELECT order_id, user_id, amount, request_hash, outcome, NULLIF(reason, ''),
                    NULLIF(transfer_id, '00000000-0000-0000-0000-000000000000'), request_event_id, event_id, last_ask
             FROM unnest($1::uuid[], $2::text[], $3::bigint[], $4::bytea[], $5::text[], $6::text[], $7::uuid[], $8::uuid[],
                         $9::uuid[], $10::integer[])
                  AS v (order_id, user_id, amount, request_hash, outcome, reason, transfer_id, request_event_id, event_id, last_ask)
             WHERE NOT EXISTS (SELECT FROM payments WHERE order_id = ANY($1::uuid[]))
             ON CONFLICT (order_id) DO NOTHING
             RETURNING event_id),
         withdrawn AS (
             UPDATE accounts a SET balance = a.balance - v.total, entry_no = a.entry_no + v.entries
             FROM unnest($11::text[], $12::bigint[], $13::bigint[]) AS v (user_id, total, entries)
             WHERE a.user_id = v.user_id AND a.balance >= v.total AND EXISTS (SELECT FROM decided)
             RETURNING 1),
         moved AS (
             INSERT INTO transfers (id, kind, user_id, entry_no, debit_account, credit_account, amount, balance_after, order_id)
             SELECT id, $20, user_id, entry_no, 'user:' || user_id, $21, amount, balance_after, order_id
             FROM unnest($14::uuid[], $15::text[], $16::bigint[], $17::bigint[], $18::bigint[], $19::uuid[])
                  AS v (id, user_id, entry_no, amount, balance_after, order_id)
             WHERE EXISTS (SELECT FROM decided)),
         changed AS (
             SELECT event_id, (SELECT count(*) FROM withdrawn) AS withdrawals FROM decided)",
        [
            order_ids.into(),
            user_ids.into(),
            amounts.into(),
            hashes.into(),
            outcomes.into(),
            reasons.into(),
            transfer_ids.into(),
            request_event_ids.into(),
            event_ids.into(),
            asks.into(),
            withdrawn_from.into(),
            totals.into(),
            entries.into(),
            ids.into(),
            payers.into(),
            entry_nos.into(),
            paid.into(),
            balances.into(),
            paid_orders.into(),
            KIND_PAYMENT.into(),
            SHOP.into(),
        ],
    )
}

impl Stored {
    /// Reads the result of a [`store`].
    pub(crate) fn of(changed: &[QueryResult]) -> Result<Self, DbErr> {
        let Some(row) = changed.first() else {
            return Ok(Self::default());
        };
        let withdrawals: i64 = row.try_get("", "withdrawals")?;
        Ok(Self {
            decisions: changed.len(),
            withdrawals: usize::try_from(withdrawals).unwrap_or_default(),
        })
    }
}
