//! The orders service: accepts orders, requests their payment, and stores how each one ended.
//!
//! [`App`] contains all parts of the process. Orders arrive over HTTP and are stored in groups
//! ([`place`]). The outcomes of their payments arrive as events ([`Settle`]). An order that stays
//! NEW is re-asked ([`reconcile`]).

use std::net::SocketAddr;
use std::time::Duration;

use messaging::{AskPolicy, Flow, Stream};
use service_kit::health::Health;
use service_kit::metrics::Metrics;
use service_kit::server::ConnectionArgs;
use shared_contracts::{DLQ_STREAM, ORDERS_STREAM};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::info;

mod config;
pub mod entity;
mod error;
mod http;
mod metrics;
mod migration;
pub mod place;
mod read;
mod reconcile;
mod settle;
mod wait;

pub use config::Config;
pub use error::Error;
pub use http::openapi;
pub use migration::Migrator;
pub use settle::Settle;

/// The streams that this service publishes to.
pub const STREAMS: [Stream; 2] = [
    Stream::events(ORDERS_STREAM, "gozon.orders.>"),
    Stream::dead_letters(DLQ_STREAM, "gozon.dlq.>"),
];

/// All parts of the process.
pub struct App {
    listener: TcpListener,
    connections: ConnectionArgs,
    flow: Flow,
    settle: Settle,
    metrics: Metrics,
}

impl App {
    /// Opens the port. Does not wait for the database or the broker.
    pub async fn build(config: Config) -> anyhow::Result<Self> {
        let listener =
            service_kit::config::listen(config.listen, config.listen_unprotected).await?;
        let settle = Settle::default();
        let policy = AskPolicy {
            after: Duration::from_millis(config.ask_again_ms),
            after_max: Duration::from_millis(config.ask_again_max_ms),
            limit: config.ask_again_per_second,
        };
        let flow = Flow::connect("orders", &config.flow)
            .await?
            .owns(&STREAMS)
            .reads(settle.clone())
            .asks_again(reconcile::UnsettledOrders, policy);
        Ok(Self {
            metrics: metrics::metrics(&flow)?,
            listener,
            connections: config.connections,
            flow,
            settle,
        })
    }

    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Runs until `shutdown`. If one part fails permanently, the process ends.
    pub async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        info!(address = %self.address()?, "orders listens");
        let Self {
            listener,
            connections,
            flow,
            settle,
            metrics,
        } = self;
        let (intake, batcher) = place::intake();
        let state = http::State {
            db: flow.database().clone(),
            operators: flow.operator_api(),
            intake,
            waiting: settle.waiting.clone(),
            shutdown: shutdown.clone(),
        };
        let health = flow.health(Health::default()).routes(shutdown.clone());
        let router = http::router(state, health.merge(metrics.routes()));
        let (writes, background) = (
            flow.write_database().clone(),
            flow.background_database().clone(),
        );
        // Each in a task of its own, so that a wake-up of one does not poll all.
        let mut parts = JoinSet::new();
        let token = shutdown.clone();
        parts.spawn(async move { batcher.run(&writes, token).await });
        let token = shutdown.clone();
        parts.spawn(async move { settle.waiting.run(&background, token).await });
        parts.spawn(flow.run::<Migrator>(shutdown.clone()));
        parts.spawn(service_kit::server::serve(
            listener,
            router,
            connections,
            shutdown,
        ));
        while let Some(ended) = parts.join_next().await {
            ended??;
        }
        Ok(())
    }
}
