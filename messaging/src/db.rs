//! The connection to PostgreSQL, and what its errors mean.

use std::ops::ControlFlow;
use std::time::Duration;

use failpoint::Injected;
use futures_util::future::BoxFuture;
use sea_orm::sqlx::Connection as _;
use sea_orm::{
    ConnAcquireErr, ConnectOptions, ConnectionTrait, Database, DatabaseConnection,
    DatabaseTransaction, DbBackend, DbErr, RuntimeErr, SqlxError, Statement, TransactionTrait,
    Value,
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
const FLOW_LOCK_TIMEOUT_MS: &str = "5000";
/// For a request somebody waits, and a row that another request holds for longer belongs to a process that froze.
const HTTP_LOCK_TIMEOUT_MS: &str = "1000";
/// The server ends a transaction whose client froze, so that its row locks go. Above any wait of ours inside one.
const IDLE_IN_TRANSACTION_TIMEOUT_MS: &str = "15000";
/// A connection that was idle this long is pinged before use; the server may have gone meanwhile.
const PING_WHEN_IDLE_FOR: Duration = Duration::from_secs(1);
/// How often the tables are looked for while the database is away at start.
const MIGRATION_RETRY_DELAY: Duration = Duration::from_millis(500);
/// Looking whether the tables are up to date hangs on a connection into nothing: it is given up and tried again.
const MIGRATION_LOOK_TIMEOUT: Duration = Duration::from_secs(20);
/// Longer than any change of the tables takes, also of large ones.
const MIGRATION_TIMEOUT: Duration = Duration::from_secs(60 * 60);
/// A connection that is given back must answer within this, or it is closed: it may lead into nothing.
const GIVE_BACK_TIMEOUT: Duration = Duration::from_secs(2);
/// Any number: who migrates holds this advisory lock.
const MIGRATION_LOCK: i64 = 7_011_987;

/// Who uses a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Requests that somebody waits for.
    Http,
    /// Relay, consumer and what else goes on by itself.
    Flow,
}

/// Opens a pool, without waiting for the database: the first use connects.
///
/// Each role in a process gets a pool of its own, so that a flood of requests cannot starve the consumers.
pub async fn connect(
    url: &str,
    service: &str,
    role: Role,
    connections_max: u32,
) -> Result<DatabaseConnection, DbErr> {
    let (name, lock_timeout) = match role {
        Role::Http => ("http", HTTP_LOCK_TIMEOUT_MS),
        Role::Flow => ("flow", FLOW_LOCK_TIMEOUT_MS),
    };
    let mut options = ConnectOptions::new(url.to_owned());
    options
        .max_connections(connections_max)
        .min_connections(0)
        .connect_lazy(true)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .test_before_acquire(false)
        .test_before_acquire_if_idle_for(PING_WHEN_IDLE_FOR)
        .statement_timeout(STATEMENT_TIMEOUT)
        .set_application_name(format!("{service} {name}"))
        .sqlx_logging(false)
        .map_sqlx_postgres_opts(move |options| {
            options.options([
                ("lock_timeout", lock_timeout),
                (
                    "idle_in_transaction_session_timeout",
                    IDLE_IN_TRANSACTION_TIMEOUT_MS,
                ),
            ])
        })
        .map_sqlx_postgres_pool_opts(|options| {
            // Whoever gives up waiting, also a client that hangs up, leaves a statement unanswered. The pool's own look has
            // no time limit: it would wait for the answer for ever, and each such connection would be one less.
            options.after_release(|connection, _| {
                Box::pin(async {
                    match tokio::time::timeout(GIVE_BACK_TIMEOUT, connection.ping()).await {
                        Ok(answered) => answered.map(|()| true),
                        Err(_) => Err(SqlxError::PoolTimedOut),
                    }
                })
            })
        });
    Database::connect(options).await
}

/// Whether the database is there, for a health page that asks again and again.
pub fn probe(
    db: &DatabaseConnection,
) -> impl Fn() -> BoxFuture<'static, Result<(), String>> + Send + Sync + 'static {
    let db = db.clone();
    move || {
        let db = db.clone();
        Box::pin(async move { db.ping().await.map_err(|error| error.to_string()) })
    }
}

/// Brings the tables up to date. Replicas may start together: one migrates, the others wait for it.
pub async fn migrate<M: MigratorTrait>(db: &DatabaseConnection) -> Result<(), DbErr> {
    let look = async {
        let txn = db.begin().await?;
        txn.execute_raw(sql(
            "SELECT pg_advisory_xact_lock($1)",
            [MIGRATION_LOCK.into()],
        ))
        .await?;
        if M::get_pending_migrations(&txn).await?.is_empty() {
            txn.commit().await?;
            return Ok(None);
        }
        Ok::<_, DbErr>(Some(txn))
    };
    let Some(txn) = within(MIGRATION_LOOK_TIMEOUT, look).await? else {
        return Ok(());
    };
    // In the transaction that holds the lock, so that it cannot go while a change is still being made. An index on a large
    // table takes longer than any statement of the flow may.
    let change = async {
        txn.execute_unprepared("SET LOCAL statement_timeout = 0")
            .await?;
        M::up(&txn, None).await?;
        txn.commit().await
    };
    within(MIGRATION_TIMEOUT, change).await
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
                shutdown
                    .run_until_cancelled(tokio::time::sleep(MIGRATION_RETRY_DELAY))
                    .await;
            }
        }
    }
    false
}

/// The time as PostgreSQL keeps it: to the microsecond.
pub fn now() -> OffsetDateTime {
    let now = OffsetDateTime::now_utc();
    now.replace_nanosecond(now.microsecond() * 1000)
        .unwrap_or(now)
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
        Some(code) => {
            !(code.starts_with("22") || matches!(code.as_str(), "23502" | "23503" | "23514"))
        }
        // Without a code from the server, only what concerns the connection is transient.
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

/// The server's five-character code, if the server spoke at all.
fn sqlstate(error: &DbErr) -> Option<String> {
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

/// Whether a row of somebody else's making was in the way. Transient if a race was lost; a damaged table says it for ever.
pub fn is_unique_violation(error: &DbErr) -> bool {
    sqlstate(error).is_some_and(|code| code == "23505")
}

/// Whether a lock was not to be had in time.
pub fn is_lock_timeout(error: &DbErr) -> bool {
    sqlstate(error).is_some_and(|code| code == "55P03")
}

/// Does database work of the flow, or gives it up: a connection into nothing would hold it for ever.
pub async fn within<T, E: From<DbErr>>(
    limit: Duration,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    match tokio::time::timeout(limit, work).await {
        Ok(done) => done,
        Err(_) => Err(no_answer(limit).into()),
    }
}

fn no_answer(limit: Duration) -> DbErr {
    DbErr::Conn(RuntimeErr::Internal(format!(
        "the database did not get done within {limit:?}"
    )))
}

/// What a failpoint injects, as the database would say it.
pub fn injected(_: Injected) -> DbErr {
    DbErr::ConnectionAcquire(ConnAcquireErr::Timeout)
}

/// Runs `statement`, mostly inside a transaction, and says how many rows it touched.
pub async fn execute(db: &impl ConnectionTrait, statement: Statement) -> Result<u64, DbErr> {
    Ok(db.execute_raw(statement).await?.rows_affected())
}

/// Requests are tried again this long before the caller is told that the outcome is unknown or that nothing was done.
const RETRY_DEADLINE: Duration = Duration::from_secs(5);
const RETRY_DELAY_MIN: Duration = Duration::from_millis(20);
/// One try gets this long, well above every time limit on the server's side.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(3);
/// The last try gets at least this.
const ATTEMPT_TIMEOUT_MIN: Duration = Duration::from_secs(1);

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

/// Commits. A lost race or a violated constraint is the server's word that it rolled back; all else (no answer, a server
/// that is going down) leaves it open.
pub async fn commit(txn: DatabaseTransaction) -> Result<(), Failure> {
    txn.commit().await.map_err(|error| match sqlstate(&error) {
        Some(code) if code.starts_with("40") || code.starts_with("23") => Failure::NotDone(error),
        _ => Failure::Unknown(error),
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
        let attempt = async { query().await.map_err(Failure::NotDone) };
        match retry.settle(attempt).await {
            ControlFlow::Break(Ok(value)) => return Ok(value),
            ControlFlow::Break(Err(Failure::NotDone(error) | Failure::Unknown(error))) => {
                return Err(error);
            }
            ControlFlow::Continue(()) => {}
        }
    }
}

/// Tries a transaction again while its errors are transient, for a bounded time.
///
/// ```ignore
/// let mut retry = Retry::begin();
/// loop {
///     if let ControlFlow::Break(settled) = retry.settle(store_once(db, new)).await {
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
    waits_for_locks: bool,
}

impl Retry {
    /// Starts the clock.
    pub fn begin() -> Self {
        Self {
            deadline: Instant::now() + RETRY_DEADLINE,
            delay: RETRY_DELAY_MIN,
            unknown: false,
            waits_for_locks: true,
        }
    }

    /// The same, but a lock that is not to be had ends it: the caller can do something better than wait.
    pub fn unless_locked() -> Self {
        Self {
            waits_for_locks: false,
            ..Self::begin()
        }
    }

    /// Tries once, for a limited time. Says `Break` with the end of it, or waits a little and says `Continue`.
    pub async fn settle<T>(
        &mut self,
        attempt: impl Future<Output = Result<T, Failure>>,
    ) -> ControlFlow<Result<T, Failure>> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let limit = left.clamp(ATTEMPT_TIMEOUT_MIN, ATTEMPT_TIMEOUT);
        let tried = tokio::time::timeout(limit, attempt).await;
        let error = match tried.unwrap_or_else(|_| Err(Failure::Unknown(no_answer(limit)))) {
            Ok(value) => return ControlFlow::Break(Ok(value)),
            Err(Failure::NotDone(error)) => error,
            Err(Failure::Unknown(error)) => {
                self.unknown = true;
                error
            }
        };
        let hopeless = !is_transient(&error) || (!self.waits_for_locks && is_lock_timeout(&error));
        if hopeless || Instant::now() + self.delay > self.deadline {
            return ControlFlow::Break(Err(if self.unknown {
                Failure::Unknown(error)
            } else {
                Failure::NotDone(error)
            }));
        }
        tokio::time::sleep(self.delay.mul_f64(jitter())).await;
        self.delay *= 2;
        ControlFlow::Continue(())
    }
}
