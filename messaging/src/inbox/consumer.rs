//! Pulls messages from a durable consumer while the process runs. All messages that are ready
//! become one batch.

use std::pin::pin;
use std::time::Duration;

use anyhow::Context as _;
use async_nats::jetstream::consumer::DeliverPolicy;
use async_nats::jetstream::consumer::pull::{MessagesErrorKind, Stream as Messages};
use async_nats::jetstream::{AckKind, Message};
use broker::{Backoff, Broker};
use futures_util::{FutureExt as _, StreamExt as _};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::broker_loss::BrokerLoss;
use crate::database::Database;
use crate::health::HealthStatus;
use crate::inbox::acks::Acks;
use crate::inbox::deferred::DeferredKeys;
use crate::postgres::{self, within};
use crate::subscriber::Subscriber;
use crate::topology::{self, Ensured, NoStream, Stream, TopologySettings};

/// Maximum number of messages per transaction. A larger batch would only add latency.
const BATCH_MAX: usize = 200;
const PULL_EXPIRES: Duration = Duration::from_secs(10);
/// Without heartbeats, a stream that was deleted on the server would look like an idle one for
/// ever.
const HEARTBEAT: Duration = Duration::from_secs(2);
const MISSING_HEARTBEATS_MAX: u32 = 2;
const PING_TIMEOUT: Duration = Duration::from_secs(5);
const RETRY_DELAY_MIN: Duration = Duration::from_millis(50);
const RETRY_DELAY_MAX: Duration = Duration::from_secs(3);

/// Reads one subscription into one database.
pub(crate) struct Consumer<S> {
    pub(crate) subscriber: S,
    pub(crate) db: Database,
    pub(crate) broker: Broker,
    pub(crate) settings: TopologySettings,
    /// The stream for copies of dead letters.
    pub(crate) dead_letters: Option<Stream>,
    pub(crate) loss: BrokerLoss,
    /// Ordering keys whose messages may be deferred.
    pub(crate) deferred_keys: DeferredKeys,
    pub(crate) acks: Acks,
    pub(crate) health: HealthStatus,
}

enum PullEnd {
    Shutdown,
    /// The durable or its stream was deleted or recreated.
    Vanished(String),
    /// Messages were returned to the broker (NAK), because another replica may reach the database.
    DatabaseAway(String),
}

/// The outcome of a batch.
pub(super) enum Taken {
    /// Each message was applied, deferred or made a dead letter.
    Settled,
    /// The process shuts down: some messages are not acknowledged.
    Shutdown,
    /// The database does not answer: some messages are not acknowledged.
    DatabaseAway(String),
}

impl<S: Subscriber> Consumer<S> {
    pub(super) const NAME: &'static str = S::SUBSCRIPTION.consumer;

    /// Consumes until `shutdown`. A batch in progress is finished; only waits are interrupted.
    pub(crate) async fn run(&self, shutdown: &CancellationToken) {
        let mut backoff = Backoff::new(RETRY_DELAY_MIN, RETRY_DELAY_MAX);
        // When the lookup of the durable began, and on which connection.
        let mut searching = None;
        while !shutdown.is_cancelled() {
            if !self.broker.is_connected() {
                self.health.bad("the broker is away");
                shutdown
                    .run_until_cancelled(self.broker.until_connected())
                    .await;
                continue;
            }
            let connection_number = self.broker.connection_number();
            let since = match searching {
                Some((connection, since)) if connection == connection_number => since,
                _ => Instant::now(),
            };
            searching = Some((connection_number, since));
            match self.open(since).await {
                Ok(messages) => {
                    searching = None;
                    self.health.good();
                    backoff.reset();
                    self.acks.begin(connection_number);
                    let reconnected = self.broker.until_reconnected(connection_number);
                    match self.pull(messages, reconnected, shutdown).await {
                        PullEnd::Shutdown => return,
                        PullEnd::Vanished(why) => {
                            self.health.bad(&why);
                            warn!(consumer = Self::NAME, why, "Looking up the consumer again");
                        }
                        PullEnd::DatabaseAway(why) => {
                            self.health.bad(&why);
                            self.until_database_answers(shutdown).await;
                        }
                    }
                }
                Err(error) => {
                    // Keeps the start of the lookup only while the stream is known to be missing:
                    // nothing can have been lost since then.
                    if !error.is::<NoStream>() {
                        searching = None;
                    }
                    if self.health.bad(format!("{error:#}")) {
                        info!(
                            consumer = Self::NAME,
                            error = format!("{error:#}"),
                            "Not consuming yet; retrying"
                        );
                    }
                }
            }
            shutdown
                .run_until_cancelled(tokio::time::sleep(backoff.pause()))
                .await;
        }
    }

    /// Sends acks until `shutdown`.
    pub(crate) async fn send_acks(&self, shutdown: &CancellationToken) {
        self.acks.run(&self.broker, shutdown).await;
    }

    /// Finds or creates the durable and begins to pull. `since` is when the lookup began.
    async fn open(&self, since: Instant) -> anyhow::Result<Messages> {
        let jetstream = self.broker.jetstream();
        let (consumer, ensured) =
            topology::ensure_consumer(jetstream, &S::SUBSCRIPTION, &self.settings).await?;
        if ensured == Ensured::Created {
            let config = &consumer.cached_info().config;
            self.loss.note(match config.deliver_policy {
                // Messages that its stream received since then are still stored, and will be read.
                DeliverPolicy::All => since,
                _ => Instant::now(),
            });
        }
        consumer
            .stream()
            .max_messages_per_batch(BATCH_MAX)
            .expires(PULL_EXPIRES)
            .heartbeat(HEARTBEAT)
            .messages()
            .await
            .context("pulling cannot begin")
    }

    async fn pull(
        &self,
        messages: Messages,
        reconnected: impl Future<Output = ()>,
        shutdown: &CancellationToken,
    ) -> PullEnd {
        // Takes all messages that are ready, without waiting for more. The client fetches the next
        // messages meanwhile.
        let mut batches = messages.ready_chunks(BATCH_MAX);
        let mut missing_heartbeats = 0;
        let mut reconnected = pin!(reconnected);
        let mut disconnected = pin!(self.broker.until_disconnected().fuse());
        let mut unfinished = Vec::new();
        let end = loop {
            let next = tokio::select! {
                biased;
                () = shutdown.cancelled() => break PullEnd::Shutdown,
                next = batches.next() => next,
                () = &mut disconnected => {
                    // The client reconnects automatically. Prefetched messages can still be
                    // processed.
                    self.health.bad("the broker is away");
                    continue;
                }
                // The broker may have lost its data. Checking is cheap; a missed heartbeat is
                // detected only after seconds.
                () = &mut reconnected => {
                    break PullEnd::Vanished("there is a new connection to the broker".to_owned());
                }
            };
            let Some(chunk) = next else {
                break PullEnd::Vanished("the stream of messages ended".to_owned());
            };
            let mut batch = Vec::with_capacity(chunk.len());
            let mut vanished = None;
            for item in chunk {
                match item {
                    Ok(message) => batch.push(message),
                    Err(error) => match error.kind() {
                        MessagesErrorKind::MissingHeartbeat => missing_heartbeats += 1,
                        _ => vanished = Some(error.to_string()),
                    },
                }
            }
            if !batch.is_empty() {
                missing_heartbeats = 0;
                match self.take(&batch, shutdown).await {
                    Taken::Settled => {}
                    Taken::Shutdown => {
                        unfinished = batch;
                        break PullEnd::Shutdown;
                    }
                    Taken::DatabaseAway(why) => {
                        unfinished = batch;
                        break PullEnd::DatabaseAway(why);
                    }
                }
            }
            if missing_heartbeats >= MISSING_HEARTBEATS_MAX {
                vanished.get_or_insert_with(|| {
                    "no heartbeat from the consumer; it may have been deleted".to_owned()
                });
            }
            if let Some(why) = vanished {
                break PullEnd::Vanished(why);
            }
        };
        // Returns prefetched messages, which would otherwise be redelivered only after `ack_wait`.
        while let Some(Some(chunk)) = batches.next().now_or_never() {
            unfinished.extend(chunk.into_iter().filter_map(Result::ok));
        }
        // Stops pulling first, because the broker would redeliver returned messages to the open
        // pull request.
        drop(batches);
        self.acks.send(&self.broker).await;
        self.give_back(&unfinished).await;
        end
    }

    /// Nothing is pulled during this wait, so the broker delivers to other replicas.
    async fn until_database_answers(&self, shutdown: &CancellationToken) {
        let mut backoff = Backoff::new(RETRY_DELAY_MIN, RETRY_DELAY_MAX);
        while !shutdown.is_cancelled() {
            let pause = tokio::time::sleep(backoff.pause());
            shutdown.run_until_cancelled(pause).await;
            let answered = within(PING_TIMEOUT, postgres::is_writable(&self.db));
            match answered.await {
                Ok(false) => debug!("The database is read-only"),
                Ok(true) => return,
                Err(error) => debug!(error = %error, "The database does not answer yet"),
            }
        }
    }

    /// Returns messages to the broker (NAK), which redelivers them at once to any replica that
    /// pulls.
    async fn give_back(&self, messages: &[Message]) {
        for message in messages {
            if let Err(error) = message.ack_with(AckKind::Nak(None)).await {
                debug!(error = %error, "A message could not be returned to the broker; it is redelivered after ack_wait");
                return;
            }
        }
        if let Err(error) = self.broker.client().flush().await {
            debug!(error = %error, "Messages may not have been returned to the broker; they are redelivered after ack_wait");
        }
    }
}
