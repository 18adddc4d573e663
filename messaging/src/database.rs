//! The connections of a service to its database.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use metrics::histogram;
use sea_orm::prelude::async_trait::async_trait;
use sea_orm::{
    ConnectionTrait, DatabaseConnection, DbBackend, DbErr, ExecResult, QueryResult, RuntimeErr,
    Statement,
};
use sea_orm_migration::MigratorTrait;
use service_kit::config::Secret;
use sqlx::ConnectOptions as _;
use sqlx::postgres::PgConnectOptions;
use tokio::time::Instant;

use crate::metrics::TRANSACTION_SECONDS;
use crate::migration::migrate;
use crate::outbox::hand_off::HandOff;
use crate::outbox::message::Message;
use crate::outbox::table;
use crate::pool::{OpenTransaction, Pool};
use crate::postgres::sqlstate;
use crate::retry::{Failure, injected};
use crate::transaction::{Transaction, Work, enqueued_among};

/// On a healthy database, no statement takes this long.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(10);
/// A scan of a whole table may take this long while an old snapshot keeps dead rows.
const SCAN_STATEMENT_TIMEOUT: Duration = Duration::from_secs(600);
/// After this wait for a lock, the transaction is rolled back and retried.
const BACKGROUND_LOCK_TIMEOUT_MS: &str = "5000";
/// Short, because all messages of a batch wait for one locked row. Replicas that share a busy
/// account hold its lock for less than this.
const CONSUMERS_LOCK_TIMEOUT_MS: &str = "50";
/// A client is waiting. If a request holds a row lock for longer than this, its process is frozen.
const REQUESTS_LOCK_TIMEOUT_MS: &str = "1000";
/// The server ends the transaction of a frozen client, which releases its row locks. Longer than
/// any wait inside one of our transactions.
const IDLE_IN_TRANSACTION_TIMEOUT_MS: &str = "15000";
const OPERATOR_CONNECTIONS: u32 = 2;

/// Plans of the short statements that repeat for every order. Each of them finds a few rows by an
/// index, so its plan need not depend on its values, on the size of the tables, or on when they
/// were analyzed last. Planning for each execution took a third of PostgreSQL's time, and a plan
/// made for an empty table read the whole table for the first minute of a database's life.
const SHORT_STATEMENTS: [(&str, &str); 5] = [
    ("plan_cache_mode", "force_generic_plan"),
    ("enable_seqscan", "off"),
    ("enable_hashjoin", "off"),
    ("enable_mergejoin", "off"),
    ("jit", "off"),
];

/// What the server enforces and assumes on the connections of a pool.
struct Limits {
    statement: Duration,
    lock_ms: &'static str,
    planner: &'static [(&'static str, &'static str)],
}

impl Limits {
    fn lock(lock_ms: &'static str) -> Self {
        Self {
            statement: STATEMENT_TIMEOUT,
            lock_ms,
            planner: &SHORT_STATEMENTS,
        }
    }
}

/// A connection pool. Its transactions hand enqueued rows off to the relay of this process. Cheap
/// to clone.
#[derive(Clone)]
pub struct Database {
    pool: Pool,
    hand_off: HandOff,
}

impl Database {
    /// A pool for requests that clients wait for. Opened at once; the first use connects.
    pub fn for_requests(url: &Secret, service: &str, connections: u32) -> Result<Self, DbErr> {
        let name = format!("{service} http");
        let limits = Limits::lock(REQUESTS_LOCK_TIMEOUT_MS);
        Self::open(url, name, limits, connections)
    }

    /// A pool for requests that store something: requests that only read cannot take its
    /// connections. Opened at once; the first use connects.
    pub(crate) fn for_writes(url: &Secret, service: &str, connections: u32) -> Result<Self, DbErr> {
        let name = format!("{service} writes");
        let limits = Limits::lock(REQUESTS_LOCK_TIMEOUT_MS);
        Self::open(url, name, limits, connections)
    }

    /// A pool for the relay and the other background work: requests cannot take its
    /// connections. Opened at once; the first use connects.
    pub fn in_background(url: &Secret, service: &str, connections: u32) -> Result<Self, DbErr> {
        let name = format!("{service} flow");
        let limits = Limits::lock(BACKGROUND_LOCK_TIMEOUT_MS);
        Self::open(url, name, limits, connections)
    }

    /// A pool for consumers. Opened at once; the first use connects.
    pub(crate) fn for_consumers(
        url: &Secret,
        service: &str,
        connections: u32,
    ) -> Result<Self, DbErr> {
        let name = format!("{service} flow");
        let limits = Limits::lock(CONSUMERS_LOCK_TIMEOUT_MS);
        Self::open(url, name, limits, connections)
    }

    /// A pool for scans of whole tables, which may take long. Opened at once; the first use
    /// connects.
    pub(crate) fn for_scans(url: &Secret, service: &str, connections: u32) -> Result<Self, DbErr> {
        let name = format!("{service} scans");
        let limits = Limits {
            statement: SCAN_STATEMENT_TIMEOUT,
            planner: &[],
            ..Limits::lock(BACKGROUND_LOCK_TIMEOUT_MS)
        };
        Self::open(url, name, limits, connections)
    }

    fn open(url: &Secret, name: String, limits: Limits, connections: u32) -> Result<Self, DbErr> {
        let options: PgConnectOptions = url
            .expose()
            .parse()
            .map_err(|error| DbErr::Conn(RuntimeErr::SqlxError(Arc::new(error))))?;
        let options = options
            .disable_statement_logging()
            .application_name(&name)
            .options([
                (
                    "statement_timeout",
                    limits.statement.as_millis().to_string().as_str(),
                ),
                ("lock_timeout", limits.lock_ms),
                (
                    "idle_in_transaction_session_timeout",
                    IDLE_IN_TRANSACTION_TIMEOUT_MS,
                ),
            ])
            .options(limits.planner.iter().copied());
        Ok(Self {
            pool: Pool::new(options, connections),
            hand_off: HandOff::nowhere(),
        })
    }

    /// The same pool, but its transactions hand off to the relay that reads `hand_off`.
    pub(crate) fn handing_off_to(self, hand_off: HandOff) -> Self {
        Self { hand_off, ..self }
    }

    /// Brings the tables up to date. If replicas start together, one migrates and the others wait.
    pub async fn migrate<M: MigratorTrait>(&self) -> Result<(), DbErr> {
        migrate::<M>(self.pool.options()).await
    }

    /// Begins a transaction. `work` is one word for what it does, used as a metric label.
    pub async fn begin(&self, work: &'static str) -> Result<Transaction, DbErr> {
        self.begin_work(Work::named(work)).await
    }

    pub(crate) async fn begin_work(&self, work: Work) -> Result<Transaction, DbErr> {
        let begun = OpenTransaction::begin(&self.pool).await?;
        Ok(Transaction::new(begun, work, self.hand_off.clone()))
    }

    /// One statement that is a transaction of its own: see [`Transaction::change_and_enqueue`].
    pub async fn change_and_enqueue(
        &self,
        work: &'static str,
        change: Statement,
        messages: Vec<Message>,
    ) -> Result<Vec<QueryResult>, Failure> {
        let begun = Instant::now();
        let (statement, rows) = table::with_insert(change, messages, None);
        failpoint::of_work(work, "before_commit")?;
        let mut lease = self.pool.acquire().await?;
        // An error that the server has reported rolled the statement back. Without an answer, the
        // outcome is unknown.
        let changed = lease.query_all(statement).await.map_err(failed_change)?;
        drop(lease);
        histogram!(TRANSACTION_SECONDS, "work" => work).record(begun.elapsed());
        failpoint::of_work(work, "after_commit").map_err(|_| Failure::Unknown(injected()))?;
        self.hand_off.hand_off(enqueued_among(rows, &changed)?);
        Ok(changed)
    }

    /// Marks all connections that are open now to be closed before their next use.
    pub(crate) fn distrust_connections(&self) {
        self.pool.distrust_connections();
    }
}

fn failed_change(error: DbErr) -> Failure {
    match sqlstate(&error) {
        // The server was shut down, perhaps after the commit.
        Some(code) if !code.starts_with("57P") => Failure::NotDone(error),
        _ => Failure::Unknown(error),
    }
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Database").finish_non_exhaustive()
    }
}

/// Each statement is a transaction of its own, on any connection of the pool.
#[async_trait]
impl ConnectionTrait for Database {
    fn get_database_backend(&self) -> DbBackend {
        DbBackend::Postgres
    }

    async fn execute_raw(&self, statement: Statement) -> Result<ExecResult, DbErr> {
        self.pool.acquire().await?.execute(statement).await
    }

    async fn execute_unprepared(&self, text: &str) -> Result<ExecResult, DbErr> {
        self.pool.acquire().await?.execute_plain(text).await
    }

    async fn query_one_raw(&self, statement: Statement) -> Result<Option<QueryResult>, DbErr> {
        self.pool.acquire().await?.query_one(statement).await
    }

    async fn query_all_raw(&self, statement: Statement) -> Result<Vec<QueryResult>, DbErr> {
        self.pool.acquire().await?.query_all(statement).await
    }
}

/// A pool for the same database, in a process without a relay: enqueued rows are published by a
/// relay that polls the outbox.
impl From<DatabaseConnection> for Database {
    fn from(connection: DatabaseConnection) -> Self {
        let options = connection.get_postgres_connection_pool().connect_options();
        Self {
            pool: Pool::new((*options).clone(), OPERATOR_CONNECTIONS),
            hand_off: HandOff::nowhere(),
        }
    }
}
