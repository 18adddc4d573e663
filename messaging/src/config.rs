//! What a service that uses this crate must be told, as flags and environment variables.

use std::time::Duration;

use crate::broker::BrokerConfig;
use crate::topology::TopologySettings;

/// Database, broker, and the streams that are made when they are absent. Has no `Debug`: it holds passwords.
#[derive(Clone, clap::Args)]
pub struct FlowArgs {
    /// PostgreSQL database of this service, `postgres://user:password@host:port/database`.
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    pub database_url: String,
    /// Connections for HTTP requests.
    #[arg(long, env = "GOZON_HTTP_CONNECTIONS", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    pub http_connections: u32,
    /// Connections for relay, consumer, reconciler and health, which a flood of requests cannot take.
    #[arg(long, env = "GOZON_FLOW_CONNECTIONS", default_value_t = 8, value_parser = clap::value_parser!(u32).range(2..))]
    pub flow_connections: u32,
    /// NATS servers, separated by commas.
    #[arg(long, env = "NATS_URL", default_value = "nats://127.0.0.1:4222")]
    pub nats_url: String,
    /// NATS user. The permissions in nats/users.conf know each service by its name.
    #[arg(long, env = "NATS_USER")]
    pub nats_user: Option<String>,
    /// Password of the NATS user.
    #[arg(long, env = "NATS_PASSWORD", hide_env_values = true)]
    pub nats_password: String,
    #[command(flatten)]
    topology: TopologyArgs,
    /// How long published outbox rows and inbox rows are kept. Decisions, transfers, orders and keys are kept for ever.
    #[arg(long, env = "GOZON_KEEP_SECONDS", default_value_t = 7 * 24 * 60 * 60)]
    pub keep_seconds: u64,
}

impl FlowArgs {
    /// How `service` connects to the broker.
    pub fn broker(&self, service: &str) -> BrokerConfig {
        BrokerConfig {
            url: self.nats_url.clone(),
            user: self.nats_user.clone().unwrap_or_else(|| service.to_owned()),
            password: self.nats_password.clone(),
            name: service.to_owned(),
        }
    }

    /// How streams and consumers are made.
    pub fn topology(&self) -> TopologySettings {
        self.topology.settings()
    }
}

/// How the streams and consumers of an installation are. Services and `gozon` must be told the same.
#[derive(Clone, Debug, clap::Args)]
pub struct TopologyArgs {
    /// Size limit of the streams ORDERS and PAYMENTS, each, when they are made.
    #[arg(long, env = "GOZON_STREAM_MAX_BYTES", default_value_t = TopologySettings::default().stream_max_bytes)]
    pub stream_max_bytes: i64,
    /// Size limit of the stream DLQ when it is made.
    #[arg(long, env = "GOZON_DLQ_MAX_BYTES", default_value_t = TopologySettings::default().dlq_max_bytes)]
    pub dlq_max_bytes: i64,
    /// Copies of each stream and consumer: 1 on a single NATS server, 3 in a cluster.
    #[arg(long, env = "GOZON_STREAM_REPLICAS", default_value_t = 1)]
    pub stream_replicas: usize,
    /// How long the broker recognises a repeated message id.
    #[arg(long, env = "GOZON_DUPLICATE_WINDOW_MS", default_value_t = 120_000)]
    pub duplicate_window_ms: u64,
    /// After this long without an ack, the broker delivers a message again.
    #[arg(long, env = "GOZON_ACK_WAIT_MS", default_value_t = 30_000)]
    pub ack_wait_ms: u64,
}

impl TopologyArgs {
    /// The same in the words of [`crate::topology`].
    pub fn settings(&self) -> TopologySettings {
        TopologySettings {
            stream_max_bytes: self.stream_max_bytes,
            dlq_max_bytes: self.dlq_max_bytes,
            replicas: self.stream_replicas,
            duplicate_window: Duration::from_millis(self.duplicate_window_ms),
            ack_wait: Duration::from_millis(self.ack_wait_ms),
        }
    }
}
