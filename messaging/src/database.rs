//! The connections of a service to its database.

use std::ops::Deref;
use std::time::Duration;

use sea_orm::sqlx::Connection as _;
use sea_orm::{ConnectOptions, DatabaseConnection, DbErr, SqlxError, TransactionTrait as _};
use sea_orm_migration::MigratorTrait;
use service_kit::config::Secret;

use crate::migration::migrate;
use crate::outbox::hand_off::HandOff;
use crate::transaction::{Transaction, Work};

/// Waiting longer for a free connection means the pool is too small or the database is away.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(3);
/// No statement of ours takes this long on a healthy database.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(10);
/// A lock that is not granted: give up, roll back, retry.
const BACKGROUND_LOCK_TIMEOUT_MS: &str = "5000";
/// While a batch waits for one row, all of its messages wait. Replicas that share a busy account hold
/// it for less.
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

/// A pool of connections whose transactions hand what they enqueue to the relay of this process.
/// Cheap to clone. Dereferences to SeaORM's connection, for reading.
#[derive(Clone, Debug)]
pub struct Database {
    connection: DatabaseConnection,
    hand_off: HandOff,
}

impl Database {
    /// A pool for requests that clients wait for. Opened at once; the first use connects.
    pub async fn for_requests(
        url: &Secret,
        service: &str,
        connections: u32,
    ) -> Result<Self, DbErr> {
        let name = format!("{service} http");
        Self::connect(url, name, REQUESTS_LOCK_TIMEOUT_MS, connections).await
    }

    /// A pool for the relay and the other background work: requests cannot take its
    /// connections. Opened at once; the first use connects.
    pub async fn in_background(
        url: &Secret,
        service: &str,
        connections: u32,
    ) -> Result<Self, DbErr> {
        let name = format!("{service} flow");
        Self::connect(url, name, BACKGROUND_LOCK_TIMEOUT_MS, connections).await
    }

    /// A pool for consumers. Opened at once; the first use connects.
    pub(crate) async fn for_consumers(
        url: &Secret,
        service: &str,
        connections: u32,
    ) -> Result<Self, DbErr> {
        let name = format!("{service} flow");
        Self::connect(url, name, CONSUMERS_LOCK_TIMEOUT_MS, connections).await
    }

    async fn connect(
        url: &Secret,
        name: String,
        lock_timeout_ms: &'static str,
        connections: u32,
    ) -> Result<Self, DbErr> {
        let mut options = ConnectOptions::new(url.expose().to_owned());
        options
            .max_connections(connections)
            .min_connections(0)
            .connect_lazy(true)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .test_before_acquire(false)
            .test_before_acquire_if_idle_for(PING_WHEN_IDLE_FOR)
            .statement_timeout(STATEMENT_TIMEOUT)
            .set_application_name(name)
            .sqlx_logging(false)
            .map_sqlx_postgres_opts(move |options| {
                options.options([
                    ("lock_timeout", lock_timeout_ms),
                    (
                        "idle_in_transaction_session_timeout",
                        IDLE_IN_TRANSACTION_TIMEOUT_MS,
                    ),
                ])
            })
            .map_sqlx_postgres_pool_opts(|options| {
                // Whoever stops waiting, for example a client that disconnects, leaves a statement
                // unanswered. The pool's own ping has no timeout: on a dead connection it would
                // wait for ever, and the pool would shrink by one.
                options.after_release(|connection, _| {
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
        let begun = self.connection.begin().await?;
        Ok(Transaction::new(begun, work, self.hand_off.clone()))
    }

    pub(crate) fn probe(
        &self,
    ) -> impl Fn() -> futures_util::future::BoxFuture<'static, Result<(), String>>
    + Send
    + Sync
    + 'static
    + use<> {
        let connection = self.connection.clone();
        move || {
            let connection = connection.clone();
            Box::pin(async move { connection.ping().await.map_err(|error| error.to_string()) })
        }
    }
}

/// Hands off to no relay: what it enqueues is published by polling.
impl From<DatabaseConnection> for Database {
    fn from(connection: DatabaseConnection) -> Self {
        Self {
            connection,
            hand_off: HandOff::nowhere(),
        }
    }
}

impl Deref for Database {
    type Target = DatabaseConnection;

    fn deref(&self) -> &DatabaseConnection {
        &self.connection
    }
}
