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

/// A longer wait for a connection means that the pool is too small or the database is down.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(3);
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
/// A connection that was idle for this long is pinged before use: the server may have closed it.
const PING_WHEN_IDLE_FOR: Duration = Duration::from_secs(1);
/// A connection returned to the pool must answer a ping within this time, or it is closed.
const GIVE_BACK_TIMEOUT: Duration = Duration::from_secs(2);

/// Timeouts that the server enforces on the connections of a pool.
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

/// A connection pool. Its transactions hand enqueued rows off to the relay of this process. Cheap
/// to clone. Dereferences to SeaORM's connection, for reading.
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
                    // A cancelled request, for example of a client that disconnects, may leave a
                    // statement in progress. The pool's own ping has no timeout: on a dead
                    // connection it would never return, and the pool would lose one connection.
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

    /// The same pool, but its transactions hand off to the relay that reads `hand_off`.
    pub(crate) fn handing_off_to(self, hand_off: HandOff) -> Self {
        Self { hand_off, ..self }
    }

    /// Brings the tables up to date. If replicas start together, one migrates and the others wait.
    pub async fn migrate<M: MigratorTrait>(&self) -> Result<(), DbErr> {
        migrate::<M>(&self.connection).await
    }

    /// Begins a transaction. `work` is one word for what it does, used as a metric label.
    pub async fn begin(&self, work: &'static str) -> Result<Transaction, DbErr> {
        self.begin_work(Work::named(work)).await
    }

    pub(crate) async fn begin_work(&self, work: Work) -> Result<Transaction, DbErr> {
        let begun = begin(&self.connection).await?;
        Ok(Transaction::new(begun, work, self.hand_off.clone()))
    }

    /// Marks all connections that are open now to be closed before their next use.
    pub(crate) fn distrust_connections(&self) {
        self.server.distrust_connections();
    }
}

/// Begins a transaction. If the caller is cancelled, a task still reads the answer to BEGIN and
/// rolls the transaction back. Otherwise the pool could hand out a connection that is inside an
/// unknown transaction (sqlx 0.9.0, issue 4393).
pub(crate) async fn begin(connection: &DatabaseConnection) -> Result<DatabaseTransaction, DbErr> {
    let connection = connection.clone();
    let begun = tokio::spawn(async move { connection.begin().await });
    begun.await.unwrap_or_else(|error| {
        Err(DbErr::Conn(RuntimeErr::Internal(format!(
            "BEGIN was aborted: {error}"
        ))))
    })
}

/// Time of the last check that found the server read-only. Clones share it.
#[derive(Clone, Debug, Default)]
struct Server(Arc<Mutex<Option<Instant>>>);

impl Server {
    fn distrust_connections(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// Whether a connection of this age was opened before the server was found to be read-only.
    fn distrusts(&self, age: Duration) -> bool {
        let since = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        since.is_some_and(|since| age >= since.elapsed())
    }
}

/// Without a hand-off: the relay publishes enqueued rows by polling.
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
