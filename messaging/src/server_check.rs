//! Checks that the PostgreSQL server is writable and durable.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::future::BoxFuture;
use sea_orm::{DbErr, FromQueryResult};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::database::Database;
use crate::health::HealthStatus;
use crate::postgres::{one_row, sql, within};

const INTERVAL: Duration = Duration::from_secs(1);
/// Time limit of a check, which would hang on a dead connection.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Checks the server of the pools of one process. Clones share them.
#[derive(Clone, Debug)]
pub(crate) struct ServerCheck {
    /// The first pool runs the query.
    pub(crate) pools: [Database; 5],
    pub(crate) accept_unsafe: bool,
    /// What the last check found.
    pub(crate) read_only: Arc<AtomicBool>,
    pub(crate) health: HealthStatus,
}

/// Why a server is not used.
#[derive(Debug)]
pub(crate) enum Unfit {
    Away(DbErr),
    ReadOnly,
    /// These durability settings are off.
    Unsafe(Vec<&'static str>),
}

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Away(error) => write!(f, "{error}"),
            Self::ReadOnly => {
                f.write_str("the database is read-only: its server is a standby, or was demoted")
            }
            Self::Unsafe(settings) => write!(
                f,
                "PostgreSQL may lose committed data: enable {}, or accept it with \
                 GOZON_ACCEPT_UNSAFE_DATABASE=true",
                settings.join(", ")
            ),
        }
    }
}

#[derive(FromQueryResult)]
struct Settings {
    read_only: bool,
    fsync: bool,
    full_page_writes: bool,
    synchronous_commit: bool,
}

impl ServerCheck {
    /// Checks periodically, so that connections to a demoted server are closed even if nothing
    /// calls the health check.
    pub(crate) async fn run(&self, shutdown: &CancellationToken) {
        loop {
            let pause = tokio::time::sleep(INTERVAL);
            if shutdown.run_until_cancelled(pause).await.is_none() {
                return;
            }
            match self.check().await {
                Ok(()) => self.health.good(),
                Err(unfit) => {
                    if self.health.bad(&unfit) {
                        warn!(error = %unfit, "The database cannot be used");
                    }
                }
            }
        }
    }

    /// A read-only server may have been demoted and replaced by another one. Its connections are
    /// closed before they are used again.
    pub(crate) async fn check(&self) -> Result<(), Unfit> {
        let [asked, ..] = &self.pools;
        let settings = within(TIMEOUT, Settings::read(asked)).await;
        let settings = settings.map_err(Unfit::Away)?;
        let was_read_only = self.read_only.swap(settings.read_only, Ordering::Relaxed);
        if settings.read_only || was_read_only {
            // Also when it is over: connections were opened to the demoted server since.
            for pool in &self.pools {
                pool.distrust_connections();
            }
        }
        if settings.read_only {
            return Err(Unfit::ReadOnly);
        }
        let off = settings.off();
        if !self.accept_unsafe && !off.is_empty() {
            return Err(Unfit::Unsafe(off));
        }
        Ok(())
    }

    pub(crate) fn probe(
        &self,
    ) -> impl Fn() -> BoxFuture<'static, Result<(), String>> + Send + Sync + 'static + use<> {
        let server = self.clone();
        move || {
            let server = server.clone();
            Box::pin(async move { server.check().await.map_err(|unfit| unfit.to_string()) })
        }
    }

    /// Fails while the server may lose committed data, even if the settings accept that.
    pub(crate) fn durability_probe(
        &self,
    ) -> impl Fn() -> BoxFuture<'static, Result<(), String>> + Send + Sync + 'static + use<> {
        let strict = Self {
            accept_unsafe: false,
            ..self.clone()
        };
        move || {
            let strict = strict.clone();
            Box::pin(async move {
                match strict.check().await {
                    Err(Unfit::Unsafe(off)) => Err(format!(
                        "PostgreSQL may lose committed data: {} is off",
                        off.join(", ")
                    )),
                    _ => Ok(()),
                }
            })
        }
    }
}

impl Settings {
    async fn read(db: &Database) -> Result<Self, DbErr> {
        let query = "SELECT current_setting('transaction_read_only')::boolean AS read_only,
                            current_setting('fsync')::boolean AS fsync,
                            current_setting('full_page_writes')::boolean AS full_page_writes,
                            current_setting('synchronous_commit') <> 'off' AS synchronous_commit";
        one_row(db, sql(query, [])).await
    }

    /// The durability settings that are off.
    fn off(&self) -> Vec<&'static str> {
        let settings = [
            ("fsync", self.fsync),
            ("full_page_writes", self.full_page_writes),
            ("synchronous_commit", self.synchronous_commit),
        ];
        let off = settings.into_iter().filter(|(_, on)| !on);
        off.map(|(name, _)| name).collect()
    }
}
