//! Accounts: one row per user, with its balance.

use failpoint::removed;
use messaging::{Transaction, sql};
use sea_orm::entity::prelude::*;
use sea_orm::sea_query::LockType;
use sea_orm::{FromQueryResult, QueryOrder, QuerySelect};

#[sea_orm::model]
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "accounts")]
pub struct Model {
    #[sea_orm(primary_key, auto_increment = false)]
    pub user_id: String,
    /// Minor units.
    pub balance: i64,
    /// Number of the newest entry in the statement.
    pub entry_no: i64,
    pub idempotency_key: String,
    pub created_at: TimeDateTimeWithTimeZone,
}

impl ActiveModelBehavior for ActiveModel {}

/// The columns that a movement of money changes.
#[derive(Clone, Debug, PartialEq, Eq, FromQueryResult)]
pub(crate) struct Funds {
    pub(crate) user_id: String,
    pub(crate) balance: i64,
    pub(crate) entry_no: i64,
}

/// Locks the accounts of these users, if they exist, and returns them. They are locked in the order
/// of their user ids, so that transactions with overlapping users do not deadlock.
pub(crate) async fn lock(
    txn: &Transaction,
    mut user_ids: Vec<String>,
) -> Result<Vec<Funds>, DbErr> {
    user_ids.sort_unstable();
    user_ids.dedup();
    let accounts = Entity::find()
        .select_only()
        .columns([Column::UserId, Column::Balance, Column::EntryNo])
        .filter(Column::UserId.eq_any(user_ids))
        .order_by_asc(Column::UserId);
    let locked = if removed!("account.lock") {
        accounts
    } else {
        accounts.lock(LockType::NoKeyUpdate)
    };
    locked.into_model().all(txn).await
}

/// The sum of several payments from one account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Withdrawal {
    pub(crate) user_id: String,
    pub(crate) total: i64,
    pub(crate) entries: i64,
}

/// Adds money to an account that the transaction has locked.
pub(crate) async fn add(txn: &Transaction, user_id: &str, amount: i64) -> Result<u64, DbErr> {
    txn.execute(sql(
        "UPDATE accounts SET balance = balance + $2, entry_no = entry_no + 1 WHERE user_id = $1",
        [user_id.into(), amount.into()],
    ))
    .await
}
