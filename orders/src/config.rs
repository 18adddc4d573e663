//! Everything the process can be told.

use std::net::SocketAddr;

use messaging::config::FlowArgs;
use service_kit::telemetry::LogFormat;

/// Takes orders, has them paid, and keeps how each one ended.
#[derive(Clone, clap::Parser)]
#[command(name = "orders", version)]
pub struct Config {
    /// Address of the HTTP API.
    #[arg(long, env = "GOZON_LISTEN", default_value = "127.0.0.1:8081")]
    pub listen: SocketAddr,
    /// Allows an address that other machines can reach, although there is no login.
    #[arg(long, env = "GOZON_LISTEN_UNPROTECTED", default_value_t = false)]
    pub listen_unprotected: bool,
    #[command(flatten)]
    pub flow: FlowArgs,
    /// How log lines look.
    #[arg(long, env = "GOZON_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// What is logged: a level, or a list such as `info,orders=debug`.
    #[arg(long, env = "RUST_LOG", default_value = "info")]
    pub log_filter: String,
}
