//! The connections of a service to its database.

use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sea_orm::sqlx::Connection as _;
use sea_orm::{
    ConnectOptions, DatabaseConnection, DatabaseTransaction, DbErr, RuntimeErr, SqlxError,
    TransactionTrait as _,
};
use sea_orm_migration::MigratorTrait;
use service_kit::config::Secret;
use tokio::time::Instant;

use crate::migration::migrate;
use crate::outbox::hand_off::HandOff;
use crate::transaction::{Transaction, Work};

/// Waiting longer for a free connection means the pool is too small or the database is away.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(3);
/// No statement of ours takes this long on a healthy database.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(10);
/// A scan of a whole table, while an old snapshot keeps its dead rows.
const SCAN_STATEMENT_TIMEOUT: Duration = Duration::from_secs(600);
/// A lock that is not granted: give up, roll back, retry.
const BACKGROUND_LOCK_TIMEOUT_MS: &str = "5000";
/// While a batch waits for one row, all of its messages wait. Replicas that share a busy account
/// hold it for less.
const CONSUMERS_LOCK_TIMEOUT_MS: &str = "50";
/// A client waits, and a row that another request holds for longer belongs to a frozen process.
const REQUESTS_LOCK_TIMEOUT_MS: &str = "1000";
/// The server ends a transaction whose client froze, which frees its row locks. Longer than
/// anything that we wait for inside a transaction.
const IDLE_IN_TRANSACTION_TIMEOUT_MS: &str = "15000";
/// A connection that was idle this long is pinged before use: the server may have closed it.
const PING_WHEN_IDLE_FOR: Duration = Duration::from_secs(1);
/// A connection that is given back must answer within this, or it is closed.
const GIVE_BACK_TIMEOUT: Duration = Duration::from_secs(2);

/// What the server ends on the connections of a pool.
struct Limits {
    statement: Duration,
    lock_ms: &'static str,
}

impl Limits {
    fn lock(lock_ms: &'static str) -> Self {
        Self {
            statement: STATEMENT_TIMEOUT,
            lock_ms,
        }
    }
}

/// A pool of connections whose transactions hand what they enqueue to the relay of this process.
/// Cheap to clone. Dereferences to SeaORM's connection, for reading.
#[derive(Clone, Debug)]
pub struct Database {
    connection: DatabaseConnection,
    hand_off: HandOff,
    server: Server,
}

impl Database {
    /// A pool for requests that clients wait for. Opened at once; the first use connects.
    pub async fn for_requests(
        url: &Secret,
        service: &str,
        connections: u32,
    ) -> Result<Self, DbErr> {
        let name = format!("{service} http");
        let limits = Limits::lock(REQUESTS_LOCK_TIMEOUT_MS);
        Self::connect(url, name, limits, connections).await
    }

    /// A pool for requests that store something: requests that only read cannot take its
    /// connections. Opened at once; the first use connects.
    pub(crate) async fn for_writes(
        url: &Secret,
        service: &str,
        connections: u32,
    ) -> Result<Self, DbErr> {
        let name = format!("{service} writes");
        let limits = Limits::lock(REQUESTS_LOCK_TIMEOUT_MS);
        Self::connect(url, name, limits, connections).await
    }

    /// A pool for the relay and the other background work: requests cannot take its
    /// connections. Opened at once; the first use connects.
    pub async fn in_background(
        url: &Secret,
        service: &str,
        connections: u32,
    ) -> Result<Self, DbErr> {
        let name = format!("{service} flow");
        let limits = Limits::lock(BACKGROUND_LOCK_TIMEOUT_MS);
        Self::connect(url, name, limits, connections).await
    }

    /// A pool for consumers. Opened at once; the first use connects.
    pub(crate) async fn for_consumers(
        url: &Secret,
        service: &str,
        connections: u32,
    ) -> Result<Self, DbErr> {
        let name = format!("{service} flow");
        let limits = Limits::lock(CONSUMERS_LOCK_TIMEOUT_MS);
        Self::connect(url, name, limits, connections).await
    }

    /// A pool for scans of whole tables, which may take long. Opened at once; the first use
    /// connects.
    pub(crate) async fn for_scans(
        url: &Secret,
        service: &str,
        connections: u32,
    ) -> Result<Self, DbErr> {
        let name = format!("{service} scans");
        let limits = Limits {
            statement: SCAN_STATEMENT_TIMEOUT,
            ..Limits::lock(BACKGROUND_LOCK_TIMEOUT_MS)
        };
        Self::connect(url, name, limits, connections).await
    }

    async fn connect(
        url: &Secret,
        name: String,
        limits: Limits,
        connections: u32,
    ) -> Result<Self, DbErr> {
        let shared = Server::default();
        let server = shared.clone();
        let mut options = ConnectOptions::new(url.expose().to_owned());
        options
            .max_connections(connections)
            .min_connections(0)
            .connect_lazy(true)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .test_before_acquire(false)
            .statement_timeout(limits.statement)
            .set_application_name(name)
            .sqlx_logging(false)
            .map_sqlx_postgres_opts(move |options| {
                options.options([
                    ("lock_timeout", limits.lock_ms),
                    (
                        "idle_in_transaction_session_timeout",
                        IDLE_IN_TRANSACTION_TIMEOUT_MS,
                    ),
                ])
            })
            .map_sqlx_postgres_pool_opts(move |options| {
                let server = server.clone();
                options
                    .before_acquire(move |connection, about| {
                        let is_too_old = server.distrusts(about.age);
                        Box::pin(async move {
                            if is_too_old {
                                return Ok(false);
                            }
                            if about.idle_for > PING_WHEN_IDLE_FOR {
                                connection.ping().await?;
                            }
                            Ok(true)
                        })
                    })
                    // Whoever stops waiting, for example a client that disconnects, leaves a
                    // statement unanswered. The pool's own ping has no timeout: on a dead
                    // connection it would wait for ever, and the pool would shrink by one.
                    .after_release(|connection, _| {
                        Box::pin(async {
                            match tokio::time::timeout(GIVE_BACK_TIMEOUT, connection.ping()).await {
                                Ok(answered) => answered.map(|()| true),
                                Err(_) => Err(SqlxError::PoolTimedOut),
                            }
                        })
                    })
            });
        Ok(Self {
            connection: sea_orm::Database::connect(options).await?,
            hand_off: HandOff::default(),
            server: shared,
        })
    }

    /// The same pool, handing off to the relay that takes from `hand_off`.
    pub(crate) fn handing_off_to(self, hand_off: HandOff) -> Self {
        Self { hand_off, ..self }
    }

    /// Brings the tables up to date. If replicas start together, one migrates and the others wait.
    pub async fn migrate<M: MigratorTrait>(&self) -> Result<(), DbErr> {
        migrate::<M>(&self.connection).await
    }

    /// Begins a transaction. `work` says in one word what it does; metrics are labelled with it.
    pub async fn begin(&self, work: &'static str) -> Result<Transaction, DbErr> {
        self.begin_work(Work::named(work)).await
    }

    pub(crate) async fn begin_work(&self, work: Work) -> Result<Transaction, DbErr> {
        let begun = begin(&self.connection).await?;
        Ok(Transaction::new(begun, work, self.hand_off.clone()))
    }

    /// Closes the connections that are open now before they are used again.
    pub(crate) fn distrust_connections(&self) {
        self.server.distrust_connections();
    }
}

/// Begins a transaction that is never left half begun. If the caller stops waiting, the answer to
/// BEGIN is still read, and the transaction rolled back. Otherwise the pool would hand out a
/// connection inside a transaction that nobody knows of (sqlx 0.9.0, issue 4393).
pub(crate) async fn begin(connection: &DatabaseConnection) -> Result<DatabaseTransaction, DbErr> {
    let connection = connection.clone();
    let begun = tokio::spawn(async move { connection.begin().await });
    begun.await.unwrap_or_else(|error| {
        Err(DbErr::Conn(RuntimeErr::Internal(format!(
            "BEGIN was given up: {error}"
        ))))
    })
}

/// What the pools know about their server. Clones share it.
#[derive(Clone, Debug, Default)]
struct Server(Arc<Mutex<Option<Instant>>>);

impl Server {
    fn distrust_connections(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// Whether a connection of this age leads to a server that was found to be read-only.
    fn distrusts(&self, age: Duration) -> bool {
        let since = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        since.is_some_and(|since| age >= since.elapsed())
    }
}

/// Hands off to no relay: what it enqueues is published by polling.
impl From<DatabaseConnection> for Database {
    fn from(connection: DatabaseConnection) -> Self {
        Self {
            connection,
            hand_off: HandOff::nowhere(),
            server: Server::default(),
        }
    }
}

impl Deref for Database {
    type Target = DatabaseConnection;

    fn deref(&self) -> &DatabaseConnection {
        &self.connection
    }
}
