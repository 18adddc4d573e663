//! Settings of a service that uses this crate, as flags and environment variables.

use std::time::Duration;

use broker::BrokerConfig;
use service_kit::config::Secret;

use crate::topology::TopologySettings;

/// Database, broker, and the configuration of new streams.
#[derive(Clone, Debug, clap::Args)]
pub struct FlowArgs {
    /// PostgreSQL database of this service: `postgres://user:password@host:port/database`.
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    pub database_url: Secret,
    /// Connections for HTTP requests that read, and the same number for requests that store
    /// something.
    #[arg(long, env = "GOZON_HTTP_CONNECTIONS", default_value_t = 8,
          value_parser = clap::value_parser!(u32).range(1..))]
    pub http_connections: u32,
    /// Connections for relay, reconciler and health. HTTP requests cannot use them.
    #[arg(long, env = "GOZON_FLOW_CONNECTIONS", default_value_t = 8,
          value_parser = clap::value_parser!(u32).range(2..))]
    pub flow_connections: u32,
    /// Use a database that may lose committed data, because `fsync`, `full_page_writes` or
    /// `synchronous_commit` is off. Only for tests.
    #[arg(long, env = "GOZON_ACCEPT_UNSAFE_DATABASE", default_value_t = false)]
    pub(crate) accept_unsafe_database: bool,
    /// NATS servers, separated by commas.
    #[arg(long, env = "NATS_URL", default_value = "nats://127.0.0.1:4222")]
    pub nats_url: String,
    /// NATS user. By default the name of the service, as in nats/users.conf.
    #[arg(long, env = "NATS_USER")]
    pub nats_user: Option<String>,
    /// Password of the NATS user.
    #[arg(long, env = "NATS_PASSWORD", hide_env_values = true)]
    pub nats_password: Secret,
    #[command(flatten)]
    pub(crate) topology: TopologySettings,
    /// How long published outbox rows and inbox rows are kept. Decisions, transfers, orders and
    /// keys are kept for ever.
    #[arg(long, env = "GOZON_KEEP_SECONDS", default_value_t = 7 * 24 * 60 * 60,
          value_parser = clap::value_parser!(u64).range(..=KEEP_SECONDS_MAX))]
    keep_seconds: u64,
}

/// A hundred years: subtracted from the current time, it must still be a valid date.
const KEEP_SECONDS_MAX: u64 = 100 * 365 * 24 * 60 * 60;

impl FlowArgs {
    pub(crate) fn broker(&self, service: &str) -> BrokerConfig {
        BrokerConfig {
            url: self.nats_url.clone(),
            user: self.nats_user.clone().unwrap_or_else(|| service.to_owned()),
            password: self.nats_password.clone(),
            name: service.to_owned(),
        }
    }

    pub(crate) fn keep(&self) -> Duration {
        Duration::from_secs(self.keep_seconds)
    }
}
