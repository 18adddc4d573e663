//! What clients do with accounts: open and read them, read the statement, make deposits.

use failpoint::{failpoint, removed};
use messaging::{Database, read, retry};
use sea_orm::{ActiveValue::Set, DbErr, EntityTrait as _, TryInsertResult};
use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use uuid::Uuid;

use service_kit::idempotency::Execution;
use shared_contracts::{Amount, BALANCE_MAX, UserId};

use crate::entity::{account, transfer};
use crate::error::Error;

pub(crate) struct NewAccount {
    pub(crate) user_id: UserId,
    pub(crate) idempotency_key: String,
    pub(crate) created_at: OffsetDateTime,
}

/// `id` is minted before the first attempt, so that a retry recognises its own row.
pub(crate) struct NewDeposit {
    pub(crate) id: Uuid,
    pub(crate) user_id: UserId,
    pub(crate) amount: Amount,
    pub(crate) idempotency_key: String,
    pub(crate) created_at: OffsetDateTime,
}

/// Opens the account, or returns the one that an earlier request with this key opened.
pub(crate) async fn open(
    db: &Database,
    new: &NewAccount,
) -> Result<(account::Model, Execution), Error> {
    retry(|| open_once(db, new)).await
}

async fn open_once(db: &Database, new: &NewAccount) -> Result<(account::Model, Execution), Error> {
    let txn = db.begin("account").await?;
    let row = account::ActiveModel {
        user_id: Set(new.user_id.to_string()),
        balance: Set(0),
        entry_no: Set(0),
        idempotency_key: Set(new.idempotency_key.clone()),
        created_at: Set(new.created_at),
    };
    // A conflict returns `Inserted(0)` here, so the number must be compared.
    let inserted = account::Entity::insert(row)
        .on_conflict_do_nothing_on([account::Column::UserId])
        .exec_without_returning(&txn)
        .await?;
    let stored = account::Entity::find_by_id(new.user_id.to_string())
        .one(&txn)
        .await?;
    let stored = stored.ok_or_else(|| {
        DbErr::RecordNotFound(format!("account {} that was just stored", new.user_id))
    })?;
    let same_key = stored.idempotency_key == new.idempotency_key;
    let execution = match inserted {
        TryInsertResult::Inserted(1) => Execution::First,
        // Our own row: an earlier attempt was committed, but the reply to its commit was lost.
        _ if same_key && stored.created_at == new.created_at => Execution::First,
        _ if same_key => Execution::Replayed,
        _ => return Err(Error::AccountExists),
    };
    txn.commit().await?;
    Ok((stored, execution))
}

pub(crate) async fn find(db: &Database, user_id: &UserId) -> Result<account::Model, Error> {
    read(|| account::Entity::find_by_id(user_id.to_string()).one(db))
        .await?
        .ok_or(Error::AccountNotFound)
}

/// A page of the user's transfers, newest first, and whether there are more.
pub(crate) async fn statement(
    db: &Database,
    user_id: &UserId,
    before: Option<i64>,
    limit: usize,
) -> Result<(Vec<transfer::Model>, bool), Error> {
    find(db, user_id).await?;
    let mut entries =
        read(|| transfer::statement(db, user_id.as_str(), before, limit as u64 + 1)).await?;
    let more = entries.len() > limit;
    entries.truncate(limit);
    Ok((entries, more))
}

/// Makes the deposit, or returns the one that an earlier request with this key made.
pub(crate) async fn top_up(
    db: &Database,
    new: &NewDeposit,
) -> Result<(transfer::Model, Execution), Error> {
    retry(|| top_up_once(db, new)).await
}

/// The lock of the account serializes requests with the same key, so the second one finds the row
/// of the first.
async fn top_up_once(
    db: &Database,
    new: &NewDeposit,
) -> Result<(transfer::Model, Execution), Error> {
    let request_hash = request_hash(new);
    let user_id = new.user_id.as_str();
    let mut key = new.idempotency_key.clone();
    if removed!("deposit.idempotency_key") {
        key = new.id.to_string();
    }
    let txn = db.begin("deposit").await?;
    let Some(funds) = account::lock(&txn, vec![user_id.to_owned()]).await?.pop() else {
        return Err(Error::AccountNotFound);
    };
    if let Some(earlier) = transfer::find_deposit(&txn, user_id, &key).await? {
        return match earlier.request_hash.as_deref() {
            // Our own row: an earlier attempt was committed, but the reply to its commit was lost.
            Some(hash) if hash == request_hash && earlier.id == new.id => {
                Ok((earlier, Execution::First))
            }
            Some(hash) if hash == request_hash => Ok((earlier, Execution::Replayed)),
            _ => Err(Error::KeyReused),
        };
    }
    let amount = new.amount.minor_units();
    let Some(balance_after) = funds
        .balance
        .checked_add(amount)
        .filter(|balance| *balance <= BALANCE_MAX)
    else {
        return Err(Error::BalanceLimit);
    };
    account::add(&txn, user_id, amount).await?;
    failpoint!("deposit.after_add")?;
    let deposit = transfer::Deposit {
        id: new.id,
        user_id,
        entry_no: funds.entry_no + 1,
        amount,
        balance_after,
        idempotency_key: &key,
        request_hash,
        created_at: new.created_at,
    };
    let stored = transfer::insert_deposit(&txn, deposit).await?;
    txn.commit().await?;
    Ok((stored, Execution::First))
}

/// Hash of the fields that must be equal in two deposits with the same key.
fn request_hash(new: &NewDeposit) -> Vec<u8> {
    let mut hash = Sha256::new();
    hash.update(transfer::KIND_DEPOSIT);
    hash.update(new.amount.minor_units().to_be_bytes());
    hash.update(new.user_id.as_str());
    hash.finalize().to_vec()
}
