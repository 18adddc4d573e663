//! Settings, as flags and environment variables.

use std::net::SocketAddr;

use messaging::FlowArgs;
use service_kit::server::ConnectionArgs;
use service_kit::telemetry::LogFormat;

/// Keeps accounts and decides, once for every order, whether it is paid.
#[derive(Clone, clap::Parser)]
#[command(name = "payments", version)]
pub struct Config {
    /// Address of the HTTP API.
    #[arg(long, env = "GOZON_LISTEN", default_value = "127.0.0.1:8082")]
    pub listen: SocketAddr,
    /// Permits an address that other machines can reach, although there is no login.
    #[arg(long, env = "GOZON_LISTEN_UNPROTECTED", default_value_t = false)]
    pub listen_unprotected: bool,
    #[command(flatten)]
    pub connections: ConnectionArgs,
    /// Currency of all amounts, as shown to clients (ISO 4217).
    #[arg(long, env = "GOZON_CURRENCY", default_value = "RUB")]
    pub currency: String,
    #[command(flatten)]
    pub flow: FlowArgs,
    /// Format of log lines.
    #[arg(long, env = "GOZON_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// Log filter: a level, or a list such as `info,payments=debug`.
    #[arg(long, env = "RUST_LOG", default_value = "info")]
    pub log_filter: String,
}
