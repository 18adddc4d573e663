//! Settings, from flags and environment variables.

use std::net::SocketAddr;

use axum::http::Uri;
use broker::BrokerConfig;
use service_kit::config::Secret;
use service_kit::server::ConnectionArgs;
use service_kit::telemetry::LogFormat;

use crate::cors::Origin;
use crate::limits::LimitArgs;

/// The only address that clients need: forwards requests to orders and payments, and serves the web
/// page and the API documents.
#[derive(Clone, Debug, clap::Parser)]
#[command(name = "gateway", version)]
pub struct Config {
    /// Address of the HTTP API.
    #[arg(long, env = "GOZON_LISTEN", default_value = "127.0.0.1:8080")]
    pub listen: SocketAddr,
    /// Allow an address that other machines can reach, although there is no login.
    #[arg(long, env = "GOZON_LISTEN_UNPROTECTED", default_value_t = false)]
    pub listen_unprotected: bool,
    /// URL of the orders service.
    #[arg(
        long,
        env = "GOZON_ORDERS_URL",
        default_value = "http://127.0.0.1:8081"
    )]
    pub orders_url: Uri,
    /// URL of the payments service.
    #[arg(
        long,
        env = "GOZON_PAYMENTS_URL",
        default_value = "http://127.0.0.1:8082"
    )]
    pub payments_url: Uri,
    #[command(flatten)]
    pub connections: ConnectionArgs,
    #[command(flatten)]
    pub limits: LimitArgs,
    /// Origins of other web pages that may use the API, separated by commas, each exactly as a
    /// browser sends it (`https://shop.example`). By default only the gateway's own page may use
    /// it.
    #[arg(long, env = "GOZON_CORS_ORIGINS", value_delimiter = ',')]
    pub cors_origins: Vec<Origin>,
    #[command(flatten)]
    pub broker: BrokerArgs,
    /// Format of log lines.
    #[arg(long, env = "GOZON_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// Log filter: a level, or a list such as `info,gateway=debug`.
    #[arg(long, env = "RUST_LOG", default_value = "info")]
    pub log_filter: String,
}

/// The connection to the broker, which only live events need.
#[derive(Clone, Debug, clap::Args)]
pub struct BrokerArgs {
    /// NATS servers, separated by commas.
    #[arg(long, env = "NATS_URL", default_value = "nats://127.0.0.1:4222")]
    pub nats_url: String,
    /// NATS user. It also determines the inbox prefix, `_INBOX_<user>`, which its permissions must
    /// allow.
    #[arg(long, env = "NATS_USER", default_value = "gateway")]
    pub nats_user: String,
    /// Password of the NATS user. Without it, live events are disabled.
    #[arg(long, env = "NATS_PASSWORD", hide_env_values = true)]
    pub nats_password: Option<Secret>,
}

impl BrokerArgs {
    /// `None` if no password is set.
    pub(crate) fn config(self) -> Option<BrokerConfig> {
        Some(BrokerConfig {
            url: self.nats_url,
            user: self.nats_user,
            password: self.nats_password?,
            name: "gateway".to_owned(),
        })
    }
}
