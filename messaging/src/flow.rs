//! Assembles and runs all parts that move events in and out of a service.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use broker::Broker;
use futures_util::future::BoxFuture;
use sea_orm_migration::MigratorTrait;
use service_kit::health::Health;
use service_kit::metrics::Metrics;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::warn;
use uuid::Uuid;

use crate::ask_again::{AskAgain, AskPolicy, PendingRequests, Requests};
use crate::backlog::{self, OutboxBacklogWatch};
use crate::broker_loss::BrokerLoss;
use crate::database::Database;
use crate::dead_letters::replay::{Replay, replay};
use crate::health::HealthStatus;
use crate::inbox::acks::Acks;
use crate::inbox::consumer::Consumer;
use crate::inbox::deferred::DeferredKeys;
use crate::metrics;
use crate::operator_api::{OperatorApi, Replays};
use crate::outbox::hand_off::HandOff;
use crate::outbox::marks::Marks;
use crate::outbox::relay::Relay;
use crate::outbox::stream_watch::StreamWatch;
use crate::retention::Retention;
use crate::retry::Failure;
use crate::server_check::ServerCheck;
use crate::settings::FlowArgs;
use crate::subscriber::Subscriber;
use crate::topology::{Stream, Subscription};

/// A consumer uses one, and one for deferred messages. A service has few consumers.
const CONSUMER_CONNECTIONS: u32 = 4;
/// One for the relay and one for re-asks.
const SCAN_CONNECTIONS: u32 = 2;
/// Interval between two checks of the tables while the database is down at start.
const MIGRATION_RETRY_DELAY: std::time::Duration = std::time::Duration::from_millis(500);

/// The event flow of a service: relay, consumers, re-asks, catching up, retention.
pub struct Flow {
    service: &'static str,
    args: FlowArgs,
    requests: Database,
    writes: Database,
    background: Database,
    consumers: Database,
    scans: Database,
    pending_requests: PendingRequests,
    outbox: OutboxBacklogWatch,
    /// Whether the database was read-only when it was last checked.
    read_only: Arc<AtomicBool>,
    hand_off: HandOff,
    broker: Broker,
    streams: Vec<Stream>,
    loss: BrokerLoss,
    readers: Vec<Arc<dyn Reader>>,
    parts: Vec<Arc<dyn Part>>,
    tables: HealthStatus,
    relay: HealthStatus,
    stream_watch: HealthStatus,
}

impl Flow {
    /// Opens the pools and begins to connect. Does not wait for the database or the broker.
    pub async fn connect(service: &'static str, args: &FlowArgs) -> anyhow::Result<Self> {
        let hand_off = HandOff::default();
        let url = &args.database_url;
        let requests = Database::for_requests(url, service, args.http_connections)?;
        let writes = Database::for_writes(url, service, args.http_connections)?;
        let background = Database::in_background(url, service, args.flow_connections)?;
        let consumers = Database::for_consumers(url, service, CONSUMER_CONNECTIONS)?;
        let scans = Database::for_scans(url, service, SCAN_CONNECTIONS)?;
        Ok(Self {
            service,
            args: args.clone(),
            requests: requests.handing_off_to(hand_off.clone()),
            writes: writes.handing_off_to(hand_off.clone()),
            background: background.handing_off_to(hand_off.clone()),
            consumers: consumers.handing_off_to(hand_off.clone()),
            scans: scans.handing_off_to(hand_off.clone()),
            pending_requests: PendingRequests::default(),
            outbox: OutboxBacklogWatch::default(),
            read_only: Arc::default(),
            hand_off,
            broker: Broker::connect(args.broker(service)).await?,
            streams: Vec::new(),
            loss: BrokerLoss::default(),
            readers: Vec::new(),
            parts: Vec::new(),
            tables: HealthStatus::default(),
            relay: HealthStatus::default(),
            stream_watch: HealthStatus::default(),
        })
    }

    /// Declares the streams that this service owns. Missing ones are created.
    #[must_use]
    pub fn owns(mut self, streams: &[Stream]) -> Self {
        self.streams.extend_from_slice(streams);
        self
    }

    /// Consumes a subscription; a service may have several. Call it after [`owns`](Self::owns),
    /// which declares the stream for copies of dead letters.
    #[must_use]
    pub fn reads<S: Subscriber>(mut self, subscriber: S) -> Self {
        let dead_letters = self.streams.iter().find(|one| one.holds_dead_letters());
        let consumer = Arc::new(Consumer {
            subscriber,
            db: self.consumers.clone(),
            broker: self.broker.clone(),
            settings: self.args.topology.clone(),
            dead_letters: dead_letters.copied(),
            loss: self.loss.clone(),
            deferred_keys: DeferredKeys::default(),
            acks: Acks::default(),
            health: HealthStatus::default(),
        });
        self.readers.push(consumer);
        self
    }

    /// Re-asks requests until their answers arrive.
    #[must_use]
    pub fn asks_again<R: Requests>(mut self, requests: R, policy: AskPolicy) -> Self {
        self.parts.push(Arc::new(AskAgain {
            db: self.background.clone(),
            scan_db: self.scans.clone(),
            broker: self.broker.clone(),
            requests,
            policy,
            loss: self.loss.clone(),
            pending: self.pending_requests.clone(),
        }));
        self
    }

    /// The pool for requests that read.
    pub fn database(&self) -> &Database {
        &self.requests
    }

    /// The pool for requests that store something. Requests that read cannot take its connections.
    pub fn write_database(&self) -> &Database {
        &self.writes
    }

    /// The pool for background work, which does not compete with requests.
    pub fn background_database(&self) -> &Database {
        &self.background
    }

    pub fn operator_api(&self) -> OperatorApi {
        let readers = self.readers.iter();
        OperatorApi {
            db: self.requests.clone(),
            broker: self.broker.clone(),
            outbox: self.outbox.clone(),
            pending_requests: self.pending_requests.clone(),
            subscription: readers.map(|reader| reader.subscription()).next(),
            replays: Arc::new(Readers(self.readers.clone())),
        }
    }

    fn server_check(&self) -> ServerCheck {
        ServerCheck {
            // The check uses the background pool: a service that is busy with requests is still
            // ready.
            pools: [
                self.background.clone(),
                self.consumers.clone(),
                self.scans.clone(),
                self.requests.clone(),
                self.writes.clone(),
            ],
            accept_unsafe: self.args.accept_unsafe_database,
            read_only: self.read_only.clone(),
            health: HealthStatus::default(),
        }
    }

    /// Adds the health checks. The database and its tables are required. The broker is not: without
    /// it, requests are still accepted and events stay pending.
    pub fn health(&self, health: Health) -> Health {
        let server = self.server_check();
        let mut health = health
            .required("database", server.probe())
            .informative("durability", server.durability_probe())
            .required("tables", self.tables.probe())
            .informative("relay", self.relay.probe())
            .informative("streams", self.stream_watch.probe());
        for reader in &self.readers {
            let name = match self.readers.len() {
                1 => "consumer",
                _ => reader.subscription().consumer,
            };
            health = health.informative(name, reader.health().probe());
        }
        health
    }

    pub fn metrics(&self, metrics: Metrics) -> Metrics {
        metrics::describe();
        backlog::describe_gauges();
        let (db, outbox) = (self.background.clone(), self.outbox.clone());
        let metrics = metrics.refresh(move || {
            let (db, outbox) = (db.clone(), outbox.clone());
            async move {
                let set = backlog::set_gauges(&db, &outbox).await;
                set.map_err(|error| error.to_string())
            }
        });
        let owned = self.streams.iter().filter(|one| !one.holds_dead_letters());
        owned.fold(metrics, |metrics, stream| {
            let (broker, name) = (self.broker.clone(), stream.name);
            metrics.refresh(move || {
                let broker = broker.clone();
                async move {
                    let set = backlog::set_stream_gauges(&broker, name).await;
                    set.map_err(|error| format!("{error:#}"))
                }
            })
        })
    }

    /// Migrates the tables, retrying while the database is down, then runs until `shutdown`.
    pub async fn run<M: MigratorTrait>(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        if !self.migrate::<M>(&shutdown).await {
            return Ok(());
        }
        let server = self.server_check();
        let streams = StreamWatch::new(
            self.background.clone(),
            self.broker.clone(),
            self.streams,
            self.args.topology.clone(),
            self.loss,
            self.stream_watch,
        );
        let relay = Relay {
            db: self.background.clone(),
            scan_db: self.scans.clone(),
            broker: self.broker,
            hand_off: self.hand_off,
            streams,
            backlog: self.outbox,
            health: self.relay,
            marks: Marks::default(),
            scans_are_slow: AtomicBool::new(false),
            failed: Notify::new(),
        };
        let subscriptions = self.readers.iter().map(|reader| reader.subscription());
        let retention = Retention {
            db: self.background.clone(),
            consumers: subscriptions.map(|one| one.consumer).collect(),
            keep: self.args.keep(),
        };
        // Each in a task of its own, so that a wake-up of one does not poll all.
        let mut tasks = JoinSet::new();
        tasks.spawn(relay.run(shutdown.clone()));
        let token = shutdown.clone();
        tasks.spawn(async move { retention.run(&token).await });
        let token = shutdown.clone();
        tasks.spawn(async move { server.run(&token).await });
        let readers = self
            .readers
            .into_iter()
            .map(|reader| reader as Arc<dyn Part>);
        for part in self.parts.into_iter().chain(readers) {
            for task in part.tasks(&shutdown) {
                tasks.spawn(task);
            }
        }
        tasks.join_all().await;
        Ok(())
    }

    /// Returns false if the process shuts down before the tables are migrated.
    async fn migrate<M: MigratorTrait>(&self, shutdown: &CancellationToken) -> bool {
        let server = self.server_check();
        while !shutdown.is_cancelled() {
            let migrated = async {
                server.check().await.map_err(|unfit| unfit.to_string())?;
                let migrated = self.background.migrate::<M>().await;
                migrated.map_err(|error| error.to_string())
            };
            match migrated.await {
                Ok(()) => {
                    self.tables.good();
                    return true;
                }
                Err(error) => {
                    self.tables.bad(&error);
                    warn!(
                        service = self.service,
                        error = %error,
                        "The tables cannot be checked; retrying"
                    );
                    let pause = tokio::time::sleep(MIGRATION_RETRY_DELAY);
                    shutdown.run_until_cancelled(pause).await;
                }
            }
        }
        false
    }
}

/// A part that runs as long as the flow.
trait Part: Send + Sync {
    fn tasks(self: Arc<Self>, shutdown: &CancellationToken) -> Vec<BoxFuture<'static, ()>>;
}

impl<R: Requests> Part for AskAgain<R> {
    fn tasks(self: Arc<Self>, shutdown: &CancellationToken) -> Vec<BoxFuture<'static, ()>> {
        let shutdown = shutdown.clone();
        vec![Box::pin(async move { self.run(&shutdown).await })]
    }
}

/// A consumer of any event type.
trait Reader: Part {
    fn subscription(&self) -> Subscription;
    fn health(&self) -> &HealthStatus;
    fn replay(
        &self,
        db: Database,
        id: Uuid,
        dry_run: bool,
    ) -> BoxFuture<'_, Result<Option<Replay>, Failure>>;
}

impl<S: Subscriber> Part for Consumer<S> {
    fn tasks(self: Arc<Self>, shutdown: &CancellationToken) -> Vec<BoxFuture<'static, ()>> {
        let (pull, token) = (self.clone(), shutdown.clone());
        let pull = async move { pull.run(&token).await };
        let (acks, token) = (self.clone(), shutdown.clone());
        let acks = async move { acks.send_acks(&token).await };
        let token = shutdown.clone();
        let catch_up = async move { self.catch_up(&token).await };
        vec![Box::pin(pull), Box::pin(acks), Box::pin(catch_up)]
    }
}

impl<S: Subscriber> Reader for Consumer<S> {
    fn subscription(&self) -> Subscription {
        S::SUBSCRIPTION
    }

    fn health(&self) -> &HealthStatus {
        &self.health
    }

    fn replay(
        &self,
        db: Database,
        id: Uuid,
        dry_run: bool,
    ) -> BoxFuture<'_, Result<Option<Replay>, Failure>> {
        Box::pin(async move { replay(&db, &self.subscriber, id, dry_run).await })
    }
}

struct Readers(Vec<Arc<dyn Reader>>);

impl Replays for Readers {
    fn replay(
        &self,
        db: Database,
        id: Uuid,
        dry_run: bool,
    ) -> BoxFuture<'_, Result<Option<Replay>, Failure>> {
        Box::pin(async move {
            for reader in &self.0 {
                if let Some(replay) = reader.replay(db.clone(), id, dry_run).await? {
                    return Ok(Some(replay));
                }
            }
            Ok(None)
        })
    }
}
