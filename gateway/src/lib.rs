//! The gateway: the only address that clients need. It forwards requests to orders and payments
//! ([`forward`]), streams changes of orders to browsers ([`live`], [`events`]), and serves the web
//! page ([`page`]) and the API documents ([`http`]). It has no database and no business rules.

use std::net::SocketAddr;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::info;

use service_kit::health::Health;
use service_kit::metrics::Metrics;
use service_kit::server::ConnectionArgs;

mod change;
mod client;
mod config;
mod cors;
mod document;
mod events;
mod forward;
mod http;
mod limits;
mod listeners;
mod live;
mod ops;
mod page;
mod problems;
mod service;
mod timeline;

pub use config::{BrokerArgs, Config};
pub use cors::Origin;
pub use document::all as openapi;
pub use limits::LimitArgs;

use broker::Broker;
use events::Events;
use forward::Forwarder;
use limits::Limits;
use live::Live;
use service::Service;

/// All parts of the process.
pub struct App {
    listener: TcpListener,
    forwarder: Forwarder,
    limits: Limits,
    origins: Vec<Origin>,
    live: Option<Live>,
    connections: ConnectionArgs,
}

impl App {
    /// Opens the port. The services may start later.
    pub async fn build(config: Config) -> anyhow::Result<Self> {
        let listener =
            service_kit::config::listen(config.listen, config.listen_unprotected).await?;
        let limits = Limits::new(config.limits);
        let forwarder = Forwarder::new(&config.orders_url, &config.payments_url, limits.clone())?;
        let live = match config.broker.config() {
            Some(config) => Some(Live::new(Broker::connect(config).await?)),
            None => None,
        };
        Ok(Self {
            listener,
            forwarder,
            limits,
            origins: config.cors_origins,
            live,
            connections: config.connections,
        })
    }

    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    pub async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        info!(address = %self.listener.local_addr()?, "gateway listens");
        let metrics =
            Metrics::start("gateway", env!("CARGO_PKG_VERSION"))?.refusing(&limits::REASONS);
        let probes = self
            .health()
            .routes(shutdown.clone())
            .merge(metrics.routes());
        let forwarder = self.forwarder.with_shutdown(shutdown.clone());
        let events = Events::new(
            self.live.clone(),
            forwarder.clone(),
            self.limits.clone(),
            shutdown.clone(),
        );
        let router = http::router(
            forwarder,
            events,
            self.limits.clone(),
            &self.origins,
            probes,
        );
        let follow = async {
            if let Some(live) = &self.live {
                live.run(shutdown.clone()).await;
            }
        };
        let serve =
            service_kit::server::serve(self.listener, router, self.connections, shutdown.clone());
        let (served, (), ()) = tokio::join!(serve, self.limits.run(shutdown.clone()), follow);
        served
    }

    /// No check is required: the gateway answers for an unavailable service, so its health does not
    /// depend on other processes.
    fn health(&self) -> Health {
        let (orders, payments) = (self.forwarder.clone(), self.forwarder.clone());
        let live = self.live.clone();
        Health::default()
            .informative("orders", move || orders.clone().probe(Service::Orders))
            .informative("payments", move || {
                payments.clone().probe(Service::Payments)
            })
            .informative("events", move || {
                let health = live.as_ref().map_or_else(
                    || Err("disabled: NATS_PASSWORD is not set".to_owned()),
                    Live::health,
                );
                std::future::ready(health)
            })
    }
}
