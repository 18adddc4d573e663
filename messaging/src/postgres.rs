//! Helpers for PostgreSQL: statements, error codes, the clock.

use std::time::Duration;

use sea_orm::{
    ConnectionTrait, DbBackend, DbErr, FromQueryResult, RuntimeErr, SqlxError, Statement, Value,
};
use time::OffsetDateTime;

/// A statement with bound values.
pub fn sql<const N: usize>(text: &str, values: [Value; N]) -> Statement {
    Statement::from_sql_and_values(DbBackend::Postgres, text, values)
}

/// Runs a statement and returns the number of affected rows.
pub(crate) async fn execute(db: &impl ConnectionTrait, statement: Statement) -> Result<u64, DbErr> {
    Ok(db.execute_raw(statement).await?.rows_affected())
}

/// Runs a query that always returns one row.
pub(crate) async fn one_row<T: FromQueryResult>(
    db: &impl ConnectionTrait,
    statement: Statement,
) -> Result<T, DbErr> {
    let row = T::find_by_statement(statement).one(db).await?;
    row.ok_or_else(|| DbErr::RecordNotFound("the query returned no row".to_owned()))
}

/// The time of this process, with PostgreSQL's precision of microseconds.
pub fn now() -> OffsetDateTime {
    let now = OffsetDateTime::now_utc();
    now.replace_nanosecond(now.microsecond() * 1000)
        .unwrap_or(now)
}

/// The time by the database's clock.
pub(crate) async fn clock(db: &impl ConnectionTrait) -> Result<OffsetDateTime, DbErr> {
    let row = db
        .query_one_raw(sql("SELECT clock_timestamp() AS now", []))
        .await?;
    row.ok_or_else(|| DbErr::RecordNotFound("the time".to_owned()))?
        .try_get("", "now")
}

/// False on a standby, and on a server that was demoted.
pub(crate) async fn is_writable(db: &impl ConnectionTrait) -> Result<bool, DbErr> {
    let query = "SELECT NOT current_setting('transaction_read_only')::boolean AS writable";
    let row = db.query_one_raw(sql(query, [])).await?;
    row.map_or(Ok(false), |row| row.try_get("", "writable"))
}

/// Whether the same work can succeed later, for example after an outage, a lock timeout or a lost
/// race. Only errors that the database returns every time are not transient.
pub(crate) fn is_transient(error: &DbErr) -> bool {
    match sqlstate(error) {
        // Data exceptions; violations of not-null, foreign-key and check constraints.
        Some(code) => {
            !(code.starts_with("22") || matches!(code.as_str(), "23502" | "23503" | "23514"))
        }
        // Without an error code from the server, only connection errors are transient.
        None => match error {
            DbErr::ConnectionAcquire(_) | DbErr::Conn(RuntimeErr::Internal(_)) => true,
            DbErr::Conn(RuntimeErr::SqlxError(inner))
            | DbErr::Exec(RuntimeErr::SqlxError(inner))
            | DbErr::Query(RuntimeErr::SqlxError(inner)) => {
                matches!(
                    **inner,
                    SqlxError::Io(_)
                        | SqlxError::Tls(_)
                        | SqlxError::Protocol(_)
                        | SqlxError::PoolTimedOut
                        | SqlxError::PoolClosed
                        | SqlxError::WorkerCrashed
                )
            }
            _ => false,
        },
    }
}

/// The server's five-character error code, if the server answered.
pub(crate) fn sqlstate(error: &DbErr) -> Option<String> {
    let (DbErr::Conn(RuntimeErr::SqlxError(inner))
    | DbErr::Exec(RuntimeErr::SqlxError(inner))
    | DbErr::Query(RuntimeErr::SqlxError(inner))) = error
    else {
        return None;
    };
    inner
        .as_database_error()?
        .code()
        .map(|code| code.into_owned())
}

/// Whether the database as a whole is unavailable: no answer, shutting down or starting. Retrying
/// with other rows does not help.
pub(crate) fn is_away(error: &DbErr) -> bool {
    sqlstate(error).is_none_or(|code| code.starts_with("08") || code.starts_with("57P"))
}

/// Whether another transaction inserted the row first. The next attempt sees the row, unless the
/// table is damaged.
pub(crate) fn is_unique_violation(error: &DbErr) -> bool {
    sqlstate(error).is_some_and(|code| code == "23505")
}

pub(crate) fn is_lock_timeout(error: &DbErr) -> bool {
    sqlstate(error).is_some_and(|code| code == "55P03")
}

/// Limits the duration of database work, which would never end on a dead connection.
pub(crate) async fn within<T, E: From<DbErr>>(
    limit: Duration,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    match tokio::time::timeout(limit, work).await {
        Ok(done) => done,
        Err(_) => Err(no_answer(limit).into()),
    }
}

pub(crate) fn no_answer(limit: Duration) -> DbErr {
    DbErr::Conn(RuntimeErr::Internal(format!(
        "no answer from the database within {limit:?}"
    )))
}
