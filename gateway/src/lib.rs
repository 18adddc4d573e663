//! The gateway: the one address that clients need. It forwards what it knows to orders and payments ([`forward`]) and
//! shows the API ([`http`]). It has no database and decides nothing.

use std::net::SocketAddr;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::info;

use service_kit::health::Health;
use service_kit::metrics::Metrics;

mod config;
mod forward;
mod http;

pub use config::Config;
pub use http::openapi;

use forward::{Forwarder, Service};

/// Everything the process consists of.
pub struct App {
    listener: TcpListener,
    forwarder: Forwarder,
}

impl App {
    /// Opens the port. The services behind it are not waited for: they may come later.
    pub async fn build(config: Config) -> anyhow::Result<Self> {
        let listener = service_kit::config::listen(config.listen, config.listen_unprotected).await?;
        let forwarder = Forwarder::new(&config.orders_url, &config.payments_url)?;
        Ok(Self { listener, forwarder })
    }

    /// Where it listens.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Runs until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        info!(address = %self.listener.local_addr()?, "gateway listens");
        let metrics = Metrics::start("gateway", env!("CARGO_PKG_VERSION"))?;
        let router = http::router(self.forwarder.clone(), self.health().routes(shutdown.clone()).merge(metrics.routes()));
        service_kit::server::serve(self.listener, router, shutdown).await
    }

    /// Ready as soon as it runs: it answers for a service that is away, so nobody's health depends on another's.
    fn health(&self) -> Health {
        let (orders, payments) = (self.forwarder.clone(), self.forwarder.clone());
        Health::default()
            .informative("orders", move || orders.clone().probe(Service::Orders))
            .informative("payments", move || payments.clone().probe(Service::Payments))
    }
}
