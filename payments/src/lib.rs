//! The payments service: keeps accounts and decides, exactly once for every order, whether it is
//! paid.
//!
//! [`App`] contains all parts of the process. Orders arrive as events ([`Charge`]). Clients manage
//! accounts and deposits over HTTP ([`account`]).

use std::net::SocketAddr;

use messaging::{Flow, Stream};
use service_kit::health::Health;
use service_kit::metrics::Metrics;
use service_kit::server::ConnectionArgs;
use shared_contracts::{DLQ_STREAM, PAYMENTS_STREAM};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::info;

mod account;
mod charge;
mod config;
pub mod entity;
mod error;
mod http;
mod metrics;
mod migration;
mod timeline;

pub use charge::Charge;
pub use config::Config;
pub use http::openapi;
pub use migration::Migrator;

/// The streams that this service publishes to.
pub const STREAMS: [Stream; 2] = [
    Stream::events(PAYMENTS_STREAM, "gozon.payments.>"),
    Stream::dead_letters(DLQ_STREAM, "gozon.dlq.>"),
];

/// All parts of the process.
pub struct App {
    listener: TcpListener,
    connections: ConnectionArgs,
    flow: Flow,
    metrics: Metrics,
    currency: String,
}

impl App {
    /// Opens the port. Does not wait for the database or the broker.
    pub async fn build(config: Config) -> anyhow::Result<Self> {
        let listener =
            service_kit::config::listen(config.listen, config.listen_unprotected).await?;
        let flow = Flow::connect("payments", &config.flow)
            .await?
            .owns(&STREAMS)
            .reads(Charge);
        Ok(Self {
            metrics: metrics::metrics(&flow)?,
            listener,
            connections: config.connections,
            flow,
            currency: config.currency,
        })
    }

    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Runs until `shutdown`. If one part fails permanently, the process ends.
    pub async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        info!(address = %self.address()?, "payments listens");
        let state = http::State {
            db: self.flow.database().clone(),
            writes: self.flow.write_database().clone(),
            operators: self.flow.operator_api(),
            currency: self.currency.into(),
        };
        let health = self.flow.health(Health::default()).routes(shutdown.clone());
        let router = http::router(state, health.merge(self.metrics.routes()));
        let mut parts = JoinSet::new();
        parts.spawn(self.flow.run::<Migrator>(shutdown.clone()));
        parts.spawn(service_kit::server::serve(
            self.listener,
            router,
            self.connections,
            shutdown,
        ));
        while let Some(ended) = parts.join_next().await {
            ended??;
        }
        Ok(())
    }
}
