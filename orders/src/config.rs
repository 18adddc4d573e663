//! Settings, as flags and environment variables.

use std::net::SocketAddr;

use messaging::FlowArgs;
use service_kit::server::ConnectionArgs;
use service_kit::telemetry::LogFormat;

/// Accepts orders, requests their payment, and stores how each one ended.
#[derive(Clone, clap::Parser)]
#[command(name = "orders", version)]
pub struct Config {
    /// Address of the HTTP API.
    #[arg(long, env = "GOZON_LISTEN", default_value = "127.0.0.1:8081")]
    pub listen: SocketAddr,
    /// Permits an address that other machines can reach, although there is no login.
    #[arg(long, env = "GOZON_LISTEN_UNPROTECTED", default_value_t = false)]
    pub listen_unprotected: bool,
    #[command(flatten)]
    pub connections: ConnectionArgs,
    #[command(flatten)]
    pub flow: FlowArgs,
    /// An order that is still NEW is re-asked this many milliseconds after its last request was
    /// published. Doubles with each re-ask.
    #[arg(long, env = "GOZON_ASK_AGAIN_MS", default_value_t = 30_000)]
    pub ask_again_ms: u64,
    /// Longest interval between two re-asks of an order, in milliseconds.
    #[arg(long, env = "GOZON_ASK_AGAIN_MAX_MS", default_value_t = 600_000)]
    pub ask_again_max_ms: u64,
    /// Maximum number of orders that are re-asked per second.
    #[arg(long, env = "GOZON_ASK_AGAIN_PER_SECOND", default_value_t = 20_000)]
    pub ask_again_per_second: u32,
    /// Format of log lines.
    #[arg(long, env = "GOZON_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// Log filter: a level, or a list such as `info,orders=debug`.
    #[arg(long, env = "RUST_LOG", default_value = "info")]
    pub log_filter: String,
}
