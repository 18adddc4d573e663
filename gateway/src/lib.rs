//! The gateway: the one address that clients need. It forwards what it knows to orders and payments ([`forward`]) and
//! shows the API ([`http`]). It has no database and decides nothing.

use std::net::SocketAddr;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::info;

use service_kit::health::Health;
use service_kit::metrics::Metrics;

mod config;
mod cors;
mod document;
mod forward;
mod http;
mod limits;

pub use config::Config;
pub use cors::Origin;
pub use document::all as openapi;
pub use limits::LimitArgs;

use forward::{Forwarder, Service};
use limits::Limits;

/// Everything the process consists of.
pub struct App {
    listener: TcpListener,
    forwarder: Forwarder,
    limits: Limits,
    origins: Vec<Origin>,
}

impl App {
    /// Opens the port. The services behind it are not waited for: they may come later.
    pub async fn build(config: Config) -> anyhow::Result<Self> {
        let listener = service_kit::config::listen(config.listen, config.listen_unprotected).await?;
        let limits = Limits::new(config.limits);
        let forwarder = Forwarder::new(&config.orders_url, &config.payments_url, limits.clone())?;
        Ok(Self { listener, forwarder, limits, origins: config.cors_origins })
    }

    /// Where it listens.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Runs until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        info!(address = %self.listener.local_addr()?, "gateway listens");
        let metrics = Metrics::start("gateway", env!("CARGO_PKG_VERSION"))?;
        let probes = self.health().routes(shutdown.clone()).merge(metrics.routes());
        let router = http::router(self.forwarder, self.limits.clone(), &self.origins, probes);
        let (served, ()) =
            tokio::join!(service_kit::server::serve(self.listener, router, shutdown.clone()), self.limits.run(shutdown));
        served
    }

    /// Ready as soon as it runs: it answers for a service that is away, so nobody's health depends on another's.
    fn health(&self) -> Health {
        let (orders, payments) = (self.forwarder.clone(), self.forwarder.clone());
        Health::default()
            .informative("orders", move || orders.clone().probe(Service::Orders))
            .informative("payments", move || payments.clone().probe(Service::Payments))
    }
}
