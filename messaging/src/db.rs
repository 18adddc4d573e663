//! The connection to PostgreSQL, and what its errors mean.

use std::time::Duration;

use sea_orm::{
    ConnectOptions, ConnectionTrait, Database, DatabaseConnection, DatabaseTransaction, DbBackend, DbErr, RuntimeErr, SqlxError,
    Statement, TransactionTrait, Value,
};
use sea_orm_migration::MigratorTrait;

/// Waiting for a free connection longer than this means the pool is too small or the database is away.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(3);
/// No statement of ours takes this long on a healthy database.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(10);
/// A lock that is not to be had: give up, roll back, try again.
const LOCK_TIMEOUT_MS: &str = "5000";
/// The server ends a transaction whose client froze, so that its row locks go. Above any wait of ours inside one.
const IDLE_IN_TRANSACTION_TIMEOUT_MS: &str = "15000";
/// A connection that was idle this long is pinged before use; the server may have gone meanwhile.
const PING_WHEN_IDLE_FOR: Duration = Duration::from_secs(1);
/// Any number: who migrates holds this advisory lock.
const MIGRATION_LOCK: i64 = 7_011_987;

/// Opens a pool, without waiting for the database: the first use connects.
///
/// Each role in a process (HTTP, flow) gets a pool of its own, so that a flood of requests cannot starve the
/// consumers.
pub async fn connect(url: &str, application_name: &str, connections_max: u32) -> Result<DatabaseConnection, DbErr> {
    let mut options = ConnectOptions::new(url.to_owned());
    options
        .max_connections(connections_max)
        .min_connections(0)
        .connect_lazy(true)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .test_before_acquire(false)
        .test_before_acquire_if_idle_for(PING_WHEN_IDLE_FOR)
        .statement_timeout(STATEMENT_TIMEOUT)
        .set_application_name(application_name.to_owned())
        .sqlx_logging(false)
        .map_sqlx_postgres_opts(|options| {
            options.options([
                ("lock_timeout", LOCK_TIMEOUT_MS),
                ("idle_in_transaction_session_timeout", IDLE_IN_TRANSACTION_TIMEOUT_MS),
            ])
        });
    Database::connect(options).await
}

/// Brings the tables up to date. Replicas may start together: one migrates, the others wait for it.
pub async fn migrate<M: MigratorTrait>(db: &DatabaseConnection) -> Result<(), DbErr> {
    let lock = db.begin().await?;
    lock.execute_raw(sql("SELECT pg_advisory_xact_lock($1)", [MIGRATION_LOCK.into()])).await?;
    let migrated = M::up(db, None).await;
    lock.commit().await?;
    migrated
}

/// A PostgreSQL statement with bound values.
pub fn sql<const N: usize>(text: &str, values: [Value; N]) -> Statement {
    Statement::from_sql_and_values(DbBackend::Postgres, text, values)
}

/// Whether the same work can succeed later: the database is away, a lock was not to be had, a race was lost.
/// Only data that the database will refuse every time is not transient.
pub fn is_transient(error: &DbErr) -> bool {
    match sqlstate(error) {
        // Data exception; not-null, foreign-key and check violation.
        Some(code) => !(code.starts_with("22") || matches!(code.as_str(), "23502" | "23503" | "23514")),
        // Without a code from the server, only what concerns the connection is transient.
        None => match error {
            DbErr::ConnectionAcquire(_) => true,
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

/// The server's five-character code, if the server spoke at all.
fn sqlstate(error: &DbErr) -> Option<String> {
    let (DbErr::Conn(RuntimeErr::SqlxError(inner))
    | DbErr::Exec(RuntimeErr::SqlxError(inner))
    | DbErr::Query(RuntimeErr::SqlxError(inner))) = error
    else {
        return None;
    };
    inner.as_database_error()?.code().map(|code| code.into_owned())
}

/// Runs `statement` inside a transaction and says how many rows it touched.
pub async fn execute(txn: &DatabaseTransaction, statement: Statement) -> Result<u64, DbErr> {
    Ok(txn.execute_raw(statement).await?.rows_affected())
}
