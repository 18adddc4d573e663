//! Orders: one row per order, never deleted.

use std::collections::HashSet;

use messaging::{Database, Transaction, sql};
use sea_orm::entity::prelude::*;
use sea_orm::sea_query::{Expr, LockType};
use sea_orm::{FromQueryResult, QueryOrder, QueryResult, QuerySelect, Statement};

#[sea_orm::model]
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "orders")]
pub struct Model {
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: Uuid,
    pub user_id: String,
    /// Minor units.
    pub amount: i64,
    pub description: String,
    pub status: Status,
    /// Set if the order is CANCELLED.
    pub reason: Option<String>,
    /// The client's key for the request that created the order.
    pub idempotency_key: String,
    /// Hash of the request. The same key with another hash is a different request.
    pub request_hash: Vec<u8>,
    pub placed_event_id: Uuid,
    /// Number of re-asks.
    pub asks: i32,
    pub asked_at: Option<TimeDateTimeWithTimeZone>,
    /// The `PaymentSettled` event that made the order final.
    pub settlement_event_id: Option<Uuid>,
    /// The `OrderFinished` or `OrderCancelled` event.
    pub final_event_id: Option<Uuid>,
    pub created_at: TimeDateTimeWithTimeZone,
    pub updated_at: TimeDateTimeWithTimeZone,
}

impl ActiveModelBehavior for ActiveModel {}

#[derive(Clone, Copy, Debug, PartialEq, Eq, EnumIter, DeriveActiveEnum)]
#[sea_orm(rs_type = "String", db_type = "Text")]
pub enum Status {
    #[sea_orm(string_value = "NEW")]
    New,
    #[sea_orm(string_value = "FINISHED")]
    Finished,
    #[sea_orm(string_value = "CANCELLED")]
    Cancelled,
}

/// Columns are listed, because a prepared `SELECT *` fails permanently after a newer version adds a
/// column.
macro_rules! columns {
    () => {
        "o.id, o.user_id, o.amount, o.description, o.status, o.reason, o.idempotency_key, o.request_hash, o.placed_event_id, o.asks,
         o.asked_at, o.settlement_event_id, o.final_event_id, o.created_at, o.updated_at"
    };
}

#[derive(FromQueryResult)]
struct IdRow {
    id: Uuid,
}

/// A change that inserts the orders whose (user, key) is new. It returns their ids, which
/// [`inserted_ids`] reads. The rows are sorted, so that transactions with overlapping keys wait for
/// each other instead of deadlocking.
pub fn insert_new(mut orders: Vec<Model>) -> Statement {
    orders.sort_by(|a, b| (&a.user_id, &a.idempotency_key).cmp(&(&b.user_id, &b.idempotency_key)));
    let mut ids = Vec::with_capacity(orders.len());
    let mut user_ids = Vec::with_capacity(orders.len());
    let mut amounts = Vec::with_capacity(orders.len());
    let mut descriptions = Vec::with_capacity(orders.len());
    let mut keys = Vec::with_capacity(orders.len());
    let mut hashes = Vec::with_capacity(orders.len());
    let mut event_ids = Vec::with_capacity(orders.len());
    let mut times = Vec::with_capacity(orders.len());
    for order in orders {
        ids.push(order.id);
        user_ids.push(order.user_id);
        amounts.push(order.amount);
        descriptions.push(order.description);
        keys.push(order.idempotency_key);
        hashes.push(order.request_hash);
        event_ids.push(order.placed_event_id);
        times.push(order.created_at);
    }
    sql(
        "changed AS (
             INSERT INTO orders (id, user_id, amount, description, idempotency_key, request_hash, placed_event_id, created_at, updated_at)
             SELECT id, user_id, amount, description, key, hash, event_id, at, at
             FROM unnest($1::uuid[], $2::text[], $3::bigint[], $4::text[], $5::text[], $6::bytea[], $7::uuid[], $8::timestamptz[])
                  AS v (id, user_id, amount, description, key, hash, event_id, at)
             ON CONFLICT (user_id, idempotency_key) DO NOTHING
             RETURNING id, placed_event_id AS event_id)",
        [
            ids.into(),
            user_ids.into(),
            amounts.into(),
            descriptions.into(),
            keys.into(),
            hashes.into(),
            event_ids.into(),
            times.into(),
        ],
    )
}

pub(crate) fn inserted_ids(changed: &[QueryResult]) -> Result<HashSet<Uuid>, DbErr> {
    let rows = changed.iter().map(|row| IdRow::from_query_result(row, ""));
    rows.map(|row| Ok(row?.id)).collect()
}

/// The orders that were created with these keys. `keys[i]` is a key of `user_ids[i]`.
pub(crate) async fn find_by_keys(
    db: &Database,
    user_ids: Vec<String>,
    keys: Vec<String>,
) -> Result<Vec<Model>, DbErr> {
    Entity::find()
        .from_raw_sql(sql(
            concat!(
                "SELECT ",
                columns!(),
                " FROM unnest($1::text[], $2::text[]) AS v (user_id, key)
                  JOIN orders o ON o.user_id = v.user_id AND o.idempotency_key = v.key"
            ),
            [user_ids.into(), keys.into()],
        ))
        .all(db)
        .await
}

pub(crate) async fn find_all(txn: &Transaction, ids: Vec<Uuid>) -> Result<Vec<Model>, DbErr> {
    Entity::find().filter(Column::Id.eq_any(ids)).all(txn).await
}

/// Locks the orders, sorted by id, and returns them.
pub(crate) async fn lock(txn: &Transaction, mut ids: Vec<Uuid>) -> Result<Vec<Model>, DbErr> {
    ids.sort_unstable();
    ids.dedup();
    Entity::find()
        .filter(Column::Id.eq_any(ids))
        .order_by_asc(Column::Id)
        .lock(LockType::NoKeyUpdate)
        .all(txn)
        .await
}

/// An order that becomes final, and its outcome.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ending {
    pub(crate) id: Uuid,
    pub(crate) status: Status,
    pub(crate) reason: Option<&'static str>,
    pub(crate) placed_at: TimeDateTimeWithTimeZone,
    pub(crate) settlement_event_id: Uuid,
    pub(crate) final_event_id: Uuid,
}

/// A change that makes orders final. The transaction must have locked them while they were NEW.
pub(crate) fn end(endings: &[Ending], at: TimeDateTimeWithTimeZone) -> Statement {
    let ids: Vec<Uuid> = endings.iter().map(|one| one.id).collect();
    let statuses: Vec<String> = endings.iter().map(|one| one.status.to_value()).collect();
    // The driver's arrays cannot contain NULL, so an empty reason means none.
    //
    // `IS NOT DISTINCT FROM 'NEW'` keeps PostgreSQL from using the index of NEW orders. PostgreSQL
    // estimates that there are almost none, and would compare each NEW order with each of these.
    let reasons: Vec<String> = endings
        .iter()
        .map(|one| one.reason.unwrap_or_default().to_owned())
        .collect();
    let settlements: Vec<Uuid> = endings.iter().map(|one| one.settlement_event_id).collect();
    let finals: Vec<Uuid> = endings.iter().map(|one| one.final_event_id).collect();
    sql(
        "changed AS (
             UPDATE orders o SET status = v.status, reason = NULLIF(v.reason, ''), settlement_event_id = v.settlement_event_id,
                                 final_event_id = v.final_event_id, updated_at = $6
             FROM unnest($1::uuid[], $2::text[], $3::text[], $4::uuid[], $5::uuid[])
                  AS v (id, status, reason, settlement_event_id, final_event_id)
             WHERE o.id = v.id AND o.status IS NOT DISTINCT FROM 'NEW'
             RETURNING o.final_event_id AS event_id)",
        [ids.into(), statuses.into(), reasons.into(), settlements.into(), finals.into(), at.into()],
    )
}

/// The ids of those orders that are final.
pub(crate) async fn final_among(db: &Database, ids: Vec<Uuid>) -> Result<Vec<Uuid>, DbErr> {
    Entity::find()
        .select_only()
        .column(Column::Id)
        .filter(Column::Id.eq_any(ids))
        .filter(Column::Status.ne(Status::New))
        .into_tuple()
        .all(db)
        .await
}

#[derive(Clone, Debug, Default)]
pub struct Filter {
    pub user_id: Option<String>,
    pub status: Option<Status>,
    /// Only orders older than this one.
    pub before: Option<Uuid>,
}

/// Up to `limit` orders, newest first. Sorted by id, because newer orders have greater ids.
pub(crate) async fn list(db: &Database, filter: Filter, limit: u64) -> Result<Vec<Model>, DbErr> {
    page(filter, limit).all(db).await
}

/// The query of `list`. With any filter, PostgreSQL reads from the end of an index.
pub fn page(filter: Filter, limit: u64) -> Select<Entity> {
    let mut query = Entity::find().order_by_desc(Column::Id).limit(limit);
    if let Some(user_id) = filter.user_id {
        query = query.filter(Column::UserId.eq(user_id));
    }
    if let Some(status) = filter.status {
        // A literal, because PostgreSQL does not use a partial index for a bound value.
        query = query.filter(Expr::cust(match status {
            Status::New => "status = 'NEW'",
            Status::Finished => "status = 'FINISHED'",
            Status::Cancelled => "status = 'CANCELLED'",
        }));
    }
    if let Some(before) = filter.before {
        query = query.filter(Column::Id.lt(before));
    }
    query
}
