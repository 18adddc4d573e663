//! Decisions: how the payment of each order ended. One row per order, never deleted.

use messaging::{Transaction, sql};
use sea_orm::entity::prelude::*;

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

/// Inserts decisions of orders that have none yet, and returns their number. The rows are sorted,
/// so that workers with overlapping orders wait for each other instead of deadlocking.
pub(crate) async fn insert_new(
    txn: &Transaction,
    mut decisions: Vec<NewDecision>,
) -> Result<u64, DbErr> {
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
    txn.execute(
        sql(
            "INSERT INTO payments (order_id, user_id, amount, request_hash, outcome, reason, transfer_id, request_event_id,
                                   event_id, last_ask)
             SELECT order_id, user_id, amount, request_hash, outcome, NULLIF(reason, ''),
                    NULLIF(transfer_id, '00000000-0000-0000-0000-000000000000'), request_event_id, event_id, last_ask
             FROM unnest($1::uuid[], $2::text[], $3::bigint[], $4::bytea[], $5::text[], $6::text[], $7::uuid[], $8::uuid[],
                         $9::uuid[], $10::integer[])
                  AS v (order_id, user_id, amount, request_hash, outcome, reason, transfer_id, request_event_id, event_id, last_ask)
             ON CONFLICT (order_id) DO NOTHING",
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
            ],
        ),
    )
    .await
}
