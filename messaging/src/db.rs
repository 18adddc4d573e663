//! The connection to PostgreSQL, and what its errors mean.

use std::ops::ControlFlow;
use std::time::Duration;

use failpoint::Injected;
use sea_orm::{
    ConnAcquireErr, ConnectOptions, ConnectionTrait, Database, DatabaseConnection, DatabaseTransaction, DbBackend, DbErr,
    RuntimeErr, SqlxError, Statement, TransactionTrait, Value,
};
use sea_orm_migration::MigratorTrait;
use time::OffsetDateTime;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::broker::jitter;
use crate::vital::Vital;

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
/// How often the tables are looked for while the database is away at start.
const MIGRATION_RETRY_DELAY: Duration = Duration::from_millis(500);
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

/// Brings the tables up to date, however long the database is away. Says false if a shutdown came first.
pub async fn migrate_when_possible<M: MigratorTrait>(
    db: &DatabaseConnection,
    vital: &Vital,
    shutdown: &CancellationToken,
) -> bool {
    while !shutdown.is_cancelled() {
        match migrate::<M>(db).await {
            Ok(()) => {
                vital.good();
                return true;
            }
            Err(error) => {
                vital.bad(&error);
                warn!(error = %error, "The tables cannot be looked at; trying again");
                shutdown.run_until_cancelled(tokio::time::sleep(MIGRATION_RETRY_DELAY)).await;
            }
        }
    }
    false
}

/// The time as PostgreSQL keeps it: to the microsecond.
pub fn now() -> OffsetDateTime {
    let now = OffsetDateTime::now_utc();
    now.replace_nanosecond(now.microsecond() * 1000).unwrap_or(now)
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

/// What a failpoint injects, as the database would say it.
pub fn injected(_: Injected) -> DbErr {
    DbErr::ConnectionAcquire(ConnAcquireErr::Timeout)
}

/// Runs `statement` inside a transaction and says how many rows it touched.
pub async fn execute(txn: &DatabaseTransaction, statement: Statement) -> Result<u64, DbErr> {
    Ok(txn.execute_raw(statement).await?.rows_affected())
}

/// Requests are tried again this long before the caller is told that the outcome is unknown or that nothing was done.
const RETRY_DEADLINE: Duration = Duration::from_secs(5);
const RETRY_DELAY_MIN: Duration = Duration::from_millis(20);

/// A transaction that did not get done.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// Nothing was stored.
    #[error("the database did not do it")]
    NotDone(#[from] DbErr),
    /// The connection was lost while committing, and it could not be found out which way it went.
    #[error("the database did not say whether it did it")]
    Unknown(#[source] DbErr),
}

/// Commits. With an SQLSTATE the server itself says that it rolled back; without one nobody knows.
pub async fn commit(txn: DatabaseTransaction) -> Result<(), Failure> {
    txn.commit().await.map_err(|error| match sqlstate(&error) {
        Some(_) => Failure::NotDone(error),
        None => Failure::Unknown(error),
    })
}

/// Runs a query that only reads, again while its errors are transient, for a bounded time: a connection that the server
/// has closed shows only when it is used.
pub async fn read<T, F>(mut query: impl FnMut() -> F) -> Result<T, DbErr>
where
    F: Future<Output = Result<T, DbErr>>,
{
    let mut retry = Retry::begin();
    loop {
        match retry.settle(query().await.map_err(Failure::NotDone)).await {
            ControlFlow::Break(Ok(value)) => return Ok(value),
            ControlFlow::Break(Err(Failure::NotDone(error) | Failure::Unknown(error))) => return Err(error),
            ControlFlow::Continue(()) => {}
        }
    }
}

/// Tries a transaction again while its errors are transient, for a bounded time.
///
/// ```ignore
/// let mut retry = Retry::begin();
/// loop {
///     if let ControlFlow::Break(settled) = retry.settle(store_once(db, new).await).await {
///         return settled;
///     }
/// }
/// ```
///
/// The transaction may thus run several times, also after a commit whose answer was lost: it must use ids that were
/// minted before and recognise its own rows. Running the same rows again is how an unknown commit becomes a known
/// one: the unique index waits for the doubtful transaction and shows which way it went.
#[derive(Debug)]
pub struct Retry {
    deadline: Instant,
    delay: Duration,
    unknown: bool,
}

impl Retry {
    /// Starts the clock.
    pub fn begin() -> Self {
        Self { deadline: Instant::now() + RETRY_DEADLINE, delay: RETRY_DELAY_MIN, unknown: false }
    }

    /// Says `Break` with the end of it, or waits a little and says `Continue`.
    pub async fn settle<T>(&mut self, tried: Result<T, Failure>) -> ControlFlow<Result<T, Failure>> {
        let error = match tried {
            Ok(value) => return ControlFlow::Break(Ok(value)),
            Err(Failure::NotDone(error)) => error,
            Err(Failure::Unknown(error)) => {
                self.unknown = true;
                error
            }
        };
        if !is_transient(&error) || Instant::now() + self.delay > self.deadline {
            return ControlFlow::Break(Err(if self.unknown { Failure::Unknown(error) } else { Failure::NotDone(error) }));
        }
        tokio::time::sleep(self.delay.mul_f64(jitter())).await;
        self.delay *= 2;
        ControlFlow::Continue(())
    }
}
