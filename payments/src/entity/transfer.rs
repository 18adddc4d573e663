//! Transfers: every movement of money, append-only.

use messaging::{Database, Transaction};
use sea_orm::entity::prelude::*;
use sea_orm::{ActiveValue::Set, QueryOrder as _, QuerySelect as _};

pub(crate) const KIND_DEPOSIT: &str = "deposit";
pub(crate) const KIND_PAYMENT: &str = "payment";
/// The account that payments go to.
pub(crate) const SHOP: &str = "shop";
/// The account that deposits come from.
const WORLD: &str = "world";

#[sea_orm::model]
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "transfers")]
pub struct Model {
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: Uuid,
    /// `deposit` or `payment`.
    pub kind: String,
    pub user_id: String,
    /// Number in the user's statement.
    pub entry_no: i64,
    pub debit_account: String,
    pub credit_account: String,
    pub amount: i64,
    pub balance_after: i64,
    /// Set for a payment.
    pub order_id: Option<Uuid>,
    /// Set for a deposit: the client's key.
    pub idempotency_key: Option<String>,
    pub request_hash: Option<Vec<u8>>,
    pub created_at: TimeDateTimeWithTimeZone,
}

impl ActiveModelBehavior for ActiveModel {}

/// The deposit that this user made with this key.
pub(crate) async fn find_deposit(
    txn: &Transaction,
    user_id: &str,
    key: &str,
) -> Result<Option<Model>, DbErr> {
    Entity::find()
        .filter(Column::UserId.eq(user_id))
        .filter(Column::IdempotencyKey.eq(key))
        .one(txn)
        .await
}

/// Up to `limit` transfers of an account, newest first. Entry numbers only grow, so new transfers
/// do not shift the pages.
pub(crate) async fn statement(
    db: &Database,
    user_id: &str,
    before: Option<i64>,
    limit: u64,
) -> Result<Vec<Model>, DbErr> {
    let mut query = Entity::find()
        .filter(Column::UserId.eq(user_id))
        .order_by_desc(Column::EntryNo)
        .limit(limit);
    if let Some(before) = before {
        query = query.filter(Column::EntryNo.lt(before));
    }
    query.all(db).await
}

pub(crate) struct Deposit<'a> {
    pub(crate) id: Uuid,
    pub(crate) user_id: &'a str,
    pub(crate) entry_no: i64,
    pub(crate) amount: i64,
    pub(crate) balance_after: i64,
    pub(crate) idempotency_key: &'a str,
    pub(crate) request_hash: Vec<u8>,
    pub(crate) created_at: TimeDateTimeWithTimeZone,
}

pub(crate) async fn insert_deposit(
    txn: &Transaction,
    deposit: Deposit<'_>,
) -> Result<Model, DbErr> {
    Entity::insert(ActiveModel {
        id: Set(deposit.id),
        kind: Set(KIND_DEPOSIT.to_owned()),
        user_id: Set(deposit.user_id.to_owned()),
        entry_no: Set(deposit.entry_no),
        debit_account: Set(WORLD.to_owned()),
        credit_account: Set(user_account(deposit.user_id)),
        amount: Set(deposit.amount),
        balance_after: Set(deposit.balance_after),
        order_id: Set(None),
        idempotency_key: Set(Some(deposit.idempotency_key.to_owned())),
        request_hash: Set(Some(deposit.request_hash)),
        created_at: Set(deposit.created_at),
    })
    .exec_with_returning(txn)
    .await
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NewPayment {
    pub(crate) id: Uuid,
    pub(crate) user_id: String,
    pub(crate) entry_no: i64,
    pub(crate) amount: i64,
    pub(crate) balance_after: i64,
    pub(crate) order_id: Uuid,
}

fn user_account(user_id: &str) -> String {
    format!("user:{user_id}")
}
