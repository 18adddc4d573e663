//! The orders service: takes orders, has them paid, and keeps how each one ended.
//!
//! [`App`] is what the process consists of. Orders come in over HTTP, are stored in groups ([`intake`], [`order::place`])
//! and go out through the relay;
//! how their payment ended comes in through the consumer ([`order::settle`]). What stays NEW is asked for again
//! ([`reconcile`]).

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

mod config;
pub mod entity;
mod error;
mod http;
mod intake;
mod measured;
mod migration;
mod order;
mod reconcile;
mod timeline;
mod waiting;

pub use config::Config;
pub use http::openapi;

use entity::order::AskAgain;
use reconcile::Reconciler;
use waiting::Waiting;

/// Everything the process consists of.
pub struct App {
    listener: TcpListener,
    db: DatabaseConnection,
    outlet: Outlet,
    /// Pool of relay, consumer and the waiters' look-up; the HTTP side has its own.
    flow: DatabaseConnection,
    relay: Relay,
    consumer: Consumer,
    reconciler: Reconciler,
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
            "orders",
            db::Role::Flow,
            config.flow.flow_connections,
        )
        .await?;
        let http_db = db::connect(
            &config.flow.database_url,
            "orders",
            db::Role::Http,
            config.flow.http_connections,
        )
        .await?;
        let broker = Broker::connect(config.flow.broker("orders")).await?;
        let settings = config.flow.topology();
        let outlet = Outlet::default();
        let metrics = measured::metrics(&flow, &broker)?;
        let losses = Losses::default();
        let again = AskAgain {
            after: Duration::from_millis(config.ask_again_ms),
            after_max: Duration::from_millis(config.ask_again_max_ms),
            limit: config.ask_again_per_second,
        };
        Ok(Self {
            listener,
            db: http_db,
            outlet: outlet.clone(),
            relay: Relay {
                db: flow.clone(),
                broker: broker.clone(),
                streams: vec![
                    topology::orders_stream(&settings),
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
                subscription: topology::ORDERS_PAYMENT_SETTLED,
                settings,
                losses: losses.clone(),
                vital: Vital::starting("starting"),
            },
            reconciler: Reconciler {
                db: flow.clone(),
                again,
                losses,
                outlet,
            },
            retention: Retention {
                db: flow.clone(),
                consumer: topology::ORDERS_PAYMENT_SETTLED.consumer,
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
        info!(address = %self.listener.local_addr()?, "orders listens");
        let health = self.health();
        let Self {
            listener,
            db,
            outlet,
            flow,
            relay,
            consumer,
            reconciler,
            retention,
            schema,
            metrics,
        } = self;
        let waiting = Waiting::default();
        let (intake, clerk) = intake::open();
        let committed: Arc<dyn Fn(order::Settled) + Send + Sync> = {
            let (outlet, waiting) = (outlet.clone(), waiting.clone());
            Arc::new(move |settled: order::Settled| {
                outlet.hand_over(settled.enqueued);
                measured::ended(&settled.ended);
                waiting.wake(&settled.ended.iter().map(|one| one.id).collect::<Vec<_>>());
            })
        };
        let state = http::State {
            broker: consumer.broker.clone(),
            committed: committed.clone(),
            db: db.clone(),
            intake,
            waiting: waiting.clone(),
            shutdown: shutdown.clone(),
        };
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
                    order::settle,
                    |settled| committed(settled),
                    shutdown.clone()
                ),
                reconciler.run(shutdown.clone()),
                retention.run(shutdown.clone()),
                waiting.run(&flow, shutdown.clone()),
            )?;
            Ok(())
        };
        tokio::try_join!(
            service_kit::server::serve(listener, router, shutdown.clone()),
            clerk.run(&db, outlet, shutdown.clone()),
            flow,
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
