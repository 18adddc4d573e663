//! The payments service: keeps accounts and decides, exactly once for every order, whether it is paid.
//!
//! [`App`] is what the process consists of. Orders come in through the consumer ([`charge`]), answers go out through
//! the relay, accounts and deposits are kept over HTTP ([`account`]).

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use sea_orm::DatabaseConnection;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::info;

use messaging::broker::Broker;
use messaging::consumer::Consumer;
use messaging::losses::Losses;
use messaging::outlet::Outlet;
use messaging::relay::Relay;
use messaging::retention::Retention;
use messaging::{Vital, db, topology};
use service_kit::health::Health;
use service_kit::metrics::Metrics;

mod account;
mod charge;
mod config;
pub mod entity;
mod error;
mod http;
mod measured;
mod migration;
mod timeline;

pub use config::Config;
pub use http::openapi;

/// Everything the process consists of.
pub struct App {
    listener: TcpListener,
    http: http::State,
    /// Pool of relay and consumer; the HTTP side has its own.
    flow: DatabaseConnection,
    relay: Relay,
    consumer: Consumer,
    retention: Retention,
    schema: Vital,
    metrics: Metrics,
}

impl App {
    /// Opens the port. Database and broker are not waited for: they may come later.
    pub async fn build(config: Config) -> anyhow::Result<Self> {
        let listener =
            service_kit::config::listen(config.listen, config.listen_unprotected).await?;
        let flow = db::connect(
            &config.flow.database_url,
            "payments",
            db::Role::Flow,
            config.flow.flow_connections,
        )
        .await?;
        let http_db = db::connect(
            &config.flow.database_url,
            "payments",
            db::Role::Http,
            config.flow.http_connections,
        )
        .await?;
        let broker = Broker::connect(config.flow.broker("payments")).await?;
        let settings = config.flow.topology();
        let outlet = Outlet::default();
        let metrics = measured::metrics(&flow, &broker)?;
        // Nobody listens: an answer that is lost is given again when orders asks again.
        let losses = Losses::default();
        let committed: Arc<dyn Fn(charge::Charged) + Send + Sync> = {
            let outlet = outlet.clone();
            Arc::new(move |charged: charge::Charged| {
                measured::charged(&charged);
                outlet.hand_over(charged.enqueued);
            })
        };
        Ok(Self {
            listener,
            http: http::State {
                db: http_db,
                broker: broker.clone(),
                committed,
                currency: config.currency.into(),
            },
            relay: Relay {
                db: flow.clone(),
                broker: broker.clone(),
                streams: vec![
                    topology::payments_stream(&settings),
                    topology::dlq_stream(&settings),
                ],
                outlet: outlet.clone(),
                losses: losses.clone(),
                vital: Vital::starting("starting"),
                streams_vital: Vital::starting("starting"),
            },
            consumer: Consumer {
                db: flow.clone(),
                broker,
                subscription: topology::PAYMENTS_ORDER_PLACED,
                settings,
                losses,
                vital: Vital::starting("starting"),
            },
            retention: Retention {
                db: flow.clone(),
                consumer: topology::PAYMENTS_ORDER_PLACED.consumer,
                keep: Duration::from_secs(config.flow.keep_seconds),
            },
            metrics,
            flow,
            schema: Vital::starting("the tables are not there yet"),
        })
    }

    /// Where it listens.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Runs until `shutdown`. All parts are futures of one task; if one fails for good, the process ends.
    pub async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        info!(address = %self.listener.local_addr()?, "payments listens");
        let (state, health, committed) = (
            self.http.clone(),
            self.health(),
            self.http.committed.clone(),
        );
        let Self {
            listener,
            metrics,
            flow,
            relay,
            consumer,
            retention,
            schema,
            ..
        } = self;
        let router = http::router(
            state,
            health.routes(shutdown.clone()).merge(metrics.routes()),
        );
        let flow = async {
            if !db::migrate_when_possible::<migration::Migrator>(&flow, &schema, &shutdown).await {
                return Ok(());
            }
            tokio::try_join!(
                relay.run(shutdown.clone()),
                consumer.run(
                    charge::charge,
                    |charged| committed(charged),
                    shutdown.clone()
                ),
                retention.run(shutdown.clone()),
            )?;
            Ok(())
        };
        tokio::try_join!(
            service_kit::server::serve(listener, router, shutdown.clone()),
            flow
        )?;
        Ok(())
    }

    /// Ready means that HTTP can do its work. The broker is the business of relay and consumer: shown, not required.
    fn health(&self) -> Health {
        // Not the HTTP side's pool: being busy is not being unready.
        Health::default()
            .required("database", db::probe(&self.flow))
            .required("tables", self.schema.probe())
            .informative("relay", self.relay.vital.probe())
            .informative("streams", self.relay.streams_vital.probe())
            .informative("consumer", self.consumer.vital.probe())
    }
}
