//! Connections to PostgreSQL.
//!
//! sqlx's pool pings every connection that is given back, which was a third of the round trips of
//! an order. This pool never does: a connection is given back only if its last statement was
//! answered completely. If the statement was cut off, for example because its client disconnected,
//! the connection is closed, and the server rolls its transaction back.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use broker::Backoff;
use sea_orm::{ConnAcquireErr, DbErr, ExecResult, QueryResult, RuntimeErr, SqlxError, Statement};
use sea_query_sqlx::SqlxValues;
use sqlx::postgres::{PgConnectOptions, PgConnection, Postgres};
use sqlx::query::Query;
use sqlx::{AssertSqlSafe, Connection as _, Executor as _};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout, timeout_at};

/// A longer wait for a connection means that the pool is too small or the database is down.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(3);
/// A connection that was idle for this long is pinged before use: the server may have closed it.
const PING_WHEN_IDLE_FOR: Duration = Duration::from_secs(1);
const PING_TIMEOUT: Duration = Duration::from_secs(2);
const ROLLBACK_TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum wait for the end of a statement that was cut off, before its connection is closed.
const CUT_OFF_TIMEOUT: Duration = Duration::from_secs(2);
/// A connection that was idle for this long is closed.
const IDLE_MAX: Duration = Duration::from_secs(10 * 60);
/// An older connection is closed: its server process keeps memory for every table and plan.
const AGE_MAX: Duration = Duration::from_secs(30 * 60);
const CONNECT_RETRY_DELAY_MIN: Duration = Duration::from_millis(10);
const CONNECT_RETRY_DELAY_MAX: Duration = Duration::from_millis(500);

/// A pool of connections. Cheap to clone; clones share the connections.
#[derive(Clone)]
pub(crate) struct Pool(Arc<Inner>);

struct Inner {
    options: PgConnectOptions,
    permits: Arc<Semaphore>,
    /// The most recently used connection is the last.
    idle: Mutex<Vec<Open>>,
    /// Connections opened before this time are not used again.
    distrusted_at: Mutex<Option<Instant>>,
}

struct Open {
    connection: PgConnection,
    opened_at: Instant,
    used_at: Instant,
}

/// A connection in use. If dropped, it is given back to the pool or closed.
pub(crate) struct Lease {
    /// `None` only inside `drop`.
    open: Option<Open>,
    state: State,
    pool: Arc<Inner>,
    /// `None` only inside `drop`.
    permit: Option<OwnedSemaphorePermit>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// The last statement was answered completely.
    Ready,
    /// A statement was sent, and its answer has not been read.
    Busy,
    /// The connection cannot be used any more.
    Broken,
}

impl Pool {
    pub(crate) fn new(options: PgConnectOptions, connections: u32) -> Self {
        Self(Arc::new(Inner {
            options,
            permits: Arc::new(Semaphore::new(connections as usize)),
            idle: Mutex::default(),
            distrusted_at: Mutex::default(),
        }))
    }

    pub(crate) fn options(&self) -> &PgConnectOptions {
        &self.0.options
    }

    /// Takes a connection, or opens one.
    pub(crate) async fn acquire(&self) -> Result<Lease, DbErr> {
        let deadline = Instant::now() + ACQUIRE_TIMEOUT;
        let permits = self.0.permits.clone();
        let permit = match permits.clone().try_acquire_owned() {
            Ok(permit) => permit,
            Err(_) => timeout_at(deadline, permits.acquire_owned())
                .await
                .map_err(|_| DbErr::ConnectionAcquire(ConnAcquireErr::Timeout))?
                .map_err(|_| DbErr::ConnectionAcquire(ConnAcquireErr::ConnectionClosed))?,
        };
        let open = match self.take_idle().await {
            Some(open) => open,
            None => self.connect(deadline).await?,
        };
        Ok(Lease {
            open: Some(open),
            state: State::Ready,
            pool: self.0.clone(),
            permit: Some(permit),
        })
    }

    /// Marks all connections that are open now to be closed before their next use.
    pub(crate) fn distrust_connections(&self) {
        self.0.distrust();
    }

    async fn take_idle(&self) -> Option<Open> {
        loop {
            let mut open = self.0.idle().pop()?;
            if !self.0.trusts(&open) {
                continue;
            }
            if open.used_at.elapsed() < PING_WHEN_IDLE_FOR {
                return Some(open);
            }
            match timeout(PING_TIMEOUT, open.connection.ping()).await {
                Ok(Ok(())) => return Some(open),
                // The other idle connections go to the same server.
                _ => self.0.distrust(),
            }
        }
    }

    /// Retries while the server starts, as it does for some seconds after a crash.
    async fn connect(&self, deadline: Instant) -> Result<Open, DbErr> {
        let mut backoff = Backoff::new(CONNECT_RETRY_DELAY_MIN, CONNECT_RETRY_DELAY_MAX);
        loop {
            let opened_at = Instant::now();
            let connection = PgConnection::connect_with(&self.0.options);
            let error = match timeout_at(deadline, connection).await {
                Ok(Ok(connection)) => {
                    return Ok(Open {
                        connection,
                        opened_at,
                        used_at: opened_at,
                    });
                }
                Ok(Err(error)) => error,
                Err(_) => return Err(DbErr::ConnectionAcquire(ConnAcquireErr::Timeout)),
            };
            let pause = backoff.pause();
            if !is_starting(&error) || Instant::now() + pause >= deadline {
                return Err(DbErr::Conn(RuntimeErr::SqlxError(Arc::new(error))));
            }
            tokio::time::sleep(pause).await;
        }
    }
}

impl Inner {
    // Each change under these locks is one operation, so a panic leaves them consistent.
    fn idle(&self) -> MutexGuard<'_, Vec<Open>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn distrusted_at(&self) -> MutexGuard<'_, Option<Instant>> {
        let distrusted_at = self.distrusted_at.lock();
        distrusted_at.unwrap_or_else(PoisonError::into_inner)
    }

    fn distrust(&self) {
        *self.distrusted_at() = Some(Instant::now());
    }

    fn trusts(&self, open: &Open) -> bool {
        let is_newer = |distrusted_at| open.opened_at > distrusted_at;
        open.opened_at.elapsed() < AGE_MAX && self.distrusted_at().is_none_or(is_newer)
    }

    fn give_back(&self, mut open: Open) {
        if !self.trusts(&open) {
            return;
        }
        open.used_at = Instant::now();
        let mut idle = self.idle();
        idle.push(open);
        // The first is the one that was not used for the longest time.
        if idle[0].used_at.elapsed() > IDLE_MAX {
            idle.remove(0);
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let Some(mut open) = self.open.take() else {
            return;
        };
        match self.state {
            State::Ready => self.pool.give_back(open),
            State::Broken => {}
            State::Busy => {
                let permit = self.permit.take();
                if let Ok(runtime) = Handle::try_current() {
                    // The server notices the end of a connection only after the statement. The
                    // place in the pool is free then, so that cut-off statements cannot add up to
                    // more server processes than the pool has places.
                    runtime.spawn(async move {
                        let _ = timeout(CUT_OFF_TIMEOUT, open.connection.ping()).await;
                        drop((open, permit));
                    });
                }
            }
        }
    }
}

impl Lease {
    pub(crate) async fn execute(&mut self, statement: Statement) -> Result<ExecResult, DbErr> {
        let result = query(statement).execute(self.connection()?).await;
        let result = self.note(result).map_err(DbErr::Exec)?;
        Ok(result.into())
    }

    /// A statement, or several, without values. The server does not keep its plan.
    pub(crate) async fn execute_plain(&mut self, text: &str) -> Result<ExecResult, DbErr> {
        let result = self.connection()?.execute(AssertSqlSafe(text)).await;
        let result = self.note(result).map_err(DbErr::Exec)?;
        Ok(result.into())
    }

    pub(crate) async fn query_one(
        &mut self,
        statement: Statement,
    ) -> Result<Option<QueryResult>, DbErr> {
        let result = query(statement).fetch_optional(self.connection()?).await;
        let row = self.note(result).map_err(DbErr::Query)?;
        Ok(row.map(QueryResult::from))
    }

    pub(crate) async fn query_all(
        &mut self,
        statement: Statement,
    ) -> Result<Vec<QueryResult>, DbErr> {
        let result = query(statement).fetch_all(self.connection()?).await;
        let rows = self.note(result).map_err(DbErr::Query)?;
        Ok(rows.into_iter().map(QueryResult::from).collect())
    }

    /// The connection for one statement. [`note`](Self::note) follows, unless it is cut off.
    fn connection(&mut self) -> Result<&mut PgConnection, DbErr> {
        match &mut self.open {
            Some(open) if self.state == State::Ready => {
                self.state = State::Busy;
                Ok(&mut open.connection)
            }
            _ => Err(internal(
                "an earlier statement of this connection was cut off",
            )),
        }
    }

    /// Records the answer to a statement.
    fn note<T>(&mut self, result: Result<T, SqlxError>) -> Result<T, RuntimeErr> {
        let error = match result {
            Ok(done) => {
                self.state = State::Ready;
                return Ok(done);
            }
            Err(error) => error,
        };
        self.state = State::Broken;
        match &error {
            SqlxError::Database(answer) => {
                let code = answer.code();
                let code = code.as_deref().unwrap_or_default();
                // The server ended the session.
                let is_over = code.starts_with("57P") || code == "25P03";
                // A demoted server: the next connection may lead to the new primary.
                if code.starts_with("57P") || code == READ_ONLY {
                    self.pool.distrust();
                }
                if !is_over {
                    self.state = State::Ready;
                }
            }
            SqlxError::Io(_) => self.pool.distrust(),
            _ => {}
        }
        Err(RuntimeErr::SqlxError(Arc::new(error)))
    }
}

/// SQLSTATE `read_only_sql_transaction`.
const READ_ONLY: &str = "25006";

/// A connection inside a transaction. If dropped before the end, the transaction is rolled back.
pub(crate) struct OpenTransaction {
    /// `None` after the end.
    lease: Option<Lease>,
}

impl OpenTransaction {
    pub(crate) async fn begin(pool: &Pool) -> Result<Self, DbErr> {
        let mut lease = pool.acquire().await?;
        lease.execute_plain("BEGIN").await?;
        Ok(Self { lease: Some(lease) })
    }

    pub(crate) fn lease(&mut self) -> Result<&mut Lease, DbErr> {
        let over = || internal("the transaction is over");
        self.lease.as_mut().ok_or_else(over)
    }

    /// Commits or rolls back.
    pub(crate) async fn end(mut self, text: &'static str) -> Result<(), DbErr> {
        self.lease()?.execute_plain(text).await?;
        self.lease = None;
        Ok(())
    }
}

impl Drop for OpenTransaction {
    fn drop(&mut self) {
        let Some(mut lease) = self.lease.take() else {
            return;
        };
        if lease.state != State::Ready {
            return;
        }
        match Handle::try_current() {
            Ok(runtime) => {
                runtime.spawn(async move {
                    // If it fails, the connection is closed, which rolls back as well.
                    let _ = timeout(ROLLBACK_TIMEOUT, lease.execute_plain("ROLLBACK")).await;
                });
            }
            Err(_) => lease.state = State::Broken,
        }
    }
}

fn internal(text: &str) -> DbErr {
    DbErr::Conn(RuntimeErr::Internal(text.to_owned()))
}

fn query(statement: Statement) -> Query<'static, Postgres, SqlxValues> {
    let values = statement
        .values
        .unwrap_or(sea_orm::sea_query::Values(Vec::new()));
    sqlx::query_with(AssertSqlSafe(statement.sql), SqlxValues(values))
}

/// Whether the server is starting, or has no connection free yet for one that was just closed.
fn is_starting(error: &SqlxError) -> bool {
    match error {
        SqlxError::Io(error) => error.kind() == std::io::ErrorKind::ConnectionRefused,
        SqlxError::Database(error) => {
            let code = error.code();
            code.is_some_and(|code| matches!(&*code, "53300" | "57P03"))
        }
        _ => false,
    }
}
