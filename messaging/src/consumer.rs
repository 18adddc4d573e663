//! Takes messages from a durable consumer into the database: as many as are ready go into one transaction with their
//! inbox rows and their effects; then they are acknowledged. No business word in it.

use std::collections::HashMap;
use std::pin::pin;
use std::time::Duration;

use anyhow::Context as _;
use async_nats::jetstream::consumer::PullConsumer;
use async_nats::jetstream::consumer::pull::{MessagesErrorKind, Stream};
use async_nats::jetstream::{AckKind, Message};
use failpoint::{Injected, failpoint, removed};
use futures_util::{FutureExt as _, StreamExt as _};
use metrics::{counter, histogram};
use sea_orm::{DatabaseConnection, DatabaseTransaction, DbErr, TransactionTrait};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use shared_contracts::Event;

use crate::broker::{Broker, jitter};
use crate::db;
use crate::dead_letter::{self, DeadMessage, Verdict};
use crate::inbox::{self, Delivery};
use crate::incoming::{self, Incoming};
use crate::losses::Losses;
use crate::measure;
use crate::topology::{self, Ensured, NoStream, Subscription, TopologySettings};
use crate::vital::Vital;

pub use crate::incoming::{Received, read};

/// Messages in one transaction. Larger ones only add latency.
const BATCH_MAX: usize = 200;
const PULL_EXPIRES: Duration = Duration::from_secs(10);
/// Without heartbeats a stream that vanished on the server would look like a quiet one, for ever.
const HEARTBEAT: Duration = Duration::from_secs(2);
const MISSING_HEARTBEATS_MAX: u32 = 2;
const RETRY_DELAY_MIN: Duration = Duration::from_millis(50);
const RETRY_DELAY_MAX: Duration = Duration::from_secs(3);
/// A transaction that hangs (a connection into nothing) is given up and tried again on another connection.
const DELIVERY_TIMEOUT: Duration = Duration::from_secs(20);
const LAST_ACK_TIMEOUT: Duration = Duration::from_secs(2);
/// A unique index says "exists" to the loser of a race, which the next try sees and respects. Who loses this often in a
/// row meets a row that no try will ever respect: a damaged table. Then only the message that meets it is held back.
const RACES_MAX: u32 = 5;

/// A message that the handler understood and must not apply: it contradicts what is decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quarantined {
    /// Which one: its place in the slice that the handler was given.
    pub index: usize,
    /// What contradicts what.
    pub cause: String,
}

/// What a handler did with a batch.
#[derive(Debug)]
pub struct Handled<T> {
    /// Messages not applied.
    pub quarantined: Vec<Quarantined>,
    /// Handed to `committed` once the transaction has committed.
    pub effect: T,
}

/// A row of somebody else's making was in the way: run the whole batch again, and it will be seen.
#[derive(Debug, thiserror::Error)]
#[error("lost a race for {0}; the batch runs again")]
pub struct LostRace(pub &'static str);

/// Reads one subscription into one database.
pub struct Consumer {
    /// Pool of the flow, not of the HTTP side.
    pub db: DatabaseConnection,
    /// Where to read.
    pub broker: Broker,
    /// What to read.
    pub subscription: Subscription,
    /// Options of the durable, if it has to be made.
    pub settings: TopologySettings,
    /// Told when the durable had to be made: what was on its way before may be lost.
    pub losses: Losses,
    /// How it goes.
    pub vital: Vital,
}

/// Why pulling ended.
enum Ended {
    Shutdown,
    /// The durable or its stream is gone, or was made anew.
    Vanished(String),
}

impl Consumer {
    /// Consumes until `shutdown`. A batch that was begun is finished; only waits are cut short.
    ///
    /// `handle` applies a batch inside the transaction it is given; it may run again after a rollback and must take
    /// effect once. `committed` runs after the commit.
    pub async fn run<E, T>(
        self,
        handle: impl AsyncFn(&DatabaseTransaction, &[Received<E>]) -> anyhow::Result<Handled<T>>,
        committed: impl Fn(T),
        shutdown: CancellationToken,
    ) -> anyhow::Result<()>
    where
        E: Event + Clone + PartialEq,
    {
        let mut retry_delay = RETRY_DELAY_MIN;
        // The connection on which the durable is being looked for, and since when.
        let mut looking = None;
        while !shutdown.is_cancelled() {
            if !self.broker.is_connected() {
                self.vital.bad("the broker is away");
                shutdown
                    .run_until_cancelled(self.broker.until_connected())
                    .await;
                continue;
            }
            let connection_number = self.broker.connection_number();
            let since = match looking {
                Some((connection, since)) if connection == connection_number => since,
                _ => Instant::now(),
            };
            looking = Some((connection_number, since));
            match self.open(since).await {
                Ok(messages) => {
                    looking = None;
                    self.vital.good();
                    retry_delay = RETRY_DELAY_MIN;
                    let reconnected = self.broker.until_reconnected(connection_number);
                    match self
                        .pull(messages, reconnected, &handle, &committed, &shutdown)
                        .await
                    {
                        Ended::Shutdown => break,
                        Ended::Vanished(why) => {
                            self.vital.bad(&why);
                            warn!(
                                consumer = self.subscription.consumer,
                                why, "Looking for the consumer again"
                            );
                        }
                    }
                }
                Err(error) => {
                    // Only what is known to be absent has lost nothing since.
                    if !error.is::<NoStream>() {
                        looking = None;
                    }
                    if self.vital.bad(format!("{error:#}")) {
                        info!(
                            consumer = self.subscription.consumer,
                            error = format!("{error:#}"),
                            "Not consuming yet; trying again"
                        );
                    }
                }
            }
            shutdown
                .run_until_cancelled(tokio::time::sleep(retry_delay.mul_f64(jitter())))
                .await;
            retry_delay = (retry_delay * 2).min(RETRY_DELAY_MAX);
        }
        Ok(())
    }

    /// Finds the durable, which has been looked for `since` then, and begins to pull.
    async fn open(&self, since: Instant) -> anyhow::Result<Stream> {
        let (consumer, ensured): (PullConsumer, Ensured) =
            topology::ensure_consumer(self.broker.jetstream(), &self.subscription, &self.settings)
                .await?;
        if ensured == Ensured::Made {
            // What its stream was given while it was looked for is in it still, and is read from the beginning.
            self.losses.note(since);
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

    async fn pull<E, T>(
        &self,
        messages: Stream,
        reconnected: impl Future<Output = ()>,
        handle: &impl AsyncFn(&DatabaseTransaction, &[Received<E>]) -> anyhow::Result<Handled<T>>,
        committed: &impl Fn(T),
        shutdown: &CancellationToken,
    ) -> Ended
    where
        E: Event + Clone + PartialEq,
    {
        // Whatever is ready, never waiting for more. The client asks the broker for the next messages meanwhile.
        let mut batches = messages.ready_chunks(BATCH_MAX);
        let mut missing_heartbeats = 0;
        let mut reconnected = pin!(reconnected);
        let mut disconnected = pin!(self.broker.until_disconnected().fuse());
        let mut unfinished = Vec::new();
        let ended = loop {
            let next = tokio::select! {
                biased;
                () = shutdown.cancelled() => break Ended::Shutdown,
                next = batches.next() => next,
                () = &mut disconnected => {
                    // The client reconnects by itself; what it has fetched ahead is still to be taken.
                    self.vital.bad("the broker is away");
                    continue;
                }
                // The broker may have come back empty. Looking is cheap, and heartbeats would take seconds to tell.
                () = &mut reconnected => break Ended::Vanished("there is a new connection to the broker".to_owned()),
            };
            let Some(chunk) = next else {
                break Ended::Vanished("the stream of messages ended".to_owned());
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
                if !self.take(&batch, handle, committed, shutdown).await {
                    unfinished = batch;
                    break Ended::Shutdown;
                }
            }
            if missing_heartbeats >= MISSING_HEARTBEATS_MAX {
                vanished.get_or_insert_with(|| {
                    "no heartbeat from the consumer; it may be gone".to_owned()
                });
            }
            if let Some(why) = vanished {
                break Ended::Vanished(why);
            }
        };
        // What the client has fetched ahead would otherwise wait for `ack_wait` before another replica gets it.
        while let Some(Some(chunk)) = batches.next().now_or_never() {
            unfinished.extend(chunk.into_iter().filter_map(Result::ok));
        }
        // First of all it stops pulling: the broker would hand what is given back to the request that is still open.
        drop(batches);
        self.give_back(&unfinished).await;
        ended
    }

    /// Has the broker deliver these again at once, to whoever asks.
    async fn give_back(&self, messages: &[Message]) {
        for message in messages {
            if let Err(error) = message.ack_with(AckKind::Nak(None)).await {
                debug!(error = %error, "A message could not be given back; it comes again after a while");
                return;
            }
        }
        if let Err(error) = self.broker.client().flush().await {
            debug!(error = %error, "Messages may not have been given back; they come again after a while");
        }
    }

    /// Takes a batch, however often that has to be tried. Says false if a shutdown came first; the messages, never
    /// acknowledged, are delivered again.
    async fn take<E, T>(
        &self,
        batch: &[Message],
        handle: &impl AsyncFn(&DatabaseTransaction, &[Received<E>]) -> anyhow::Result<Handled<T>>,
        committed: &impl Fn(T),
        shutdown: &CancellationToken,
    ) -> bool
    where
        E: Event + Clone + PartialEq,
    {
        if failpoint!("consumer.after_fetch").is_err() {
            // As if the batch had never come: it is delivered again.
            return true;
        }
        let decoded: Vec<Incoming<'_, E>> = batch.iter().map(Incoming::decode).collect();
        if removed!("consumer.ack_after_commit") {
            self.acknowledge(&decoded, &HashMap::new()).await;
        }
        let error = match self
            .deliver_until_settled(&decoded, handle, committed, shutdown)
            .await
        {
            Settled::Committed => return true,
            Settled::Shutdown => return false,
            Settled::Refused(error) => error,
        };
        if let [single] = decoded.as_slice() {
            return self.give_up(single, &error, shutdown).await;
        }
        // One message spoils the batch: one by one, only the guilty one is held back.
        warn!(
            consumer = self.subscription.consumer,
            messages = batch.len(),
            error = format!("{error:#}"),
            "A batch failed; one by one"
        );
        for single in &decoded {
            let one = std::slice::from_ref(single);
            let goes_on = match self
                .deliver_until_settled(one, handle, committed, shutdown)
                .await
            {
                Settled::Committed => true,
                Settled::Shutdown => false,
                Settled::Refused(error) => self.give_up(single, &error, shutdown).await,
            };
            if !goes_on {
                return false;
            }
        }
        true
    }

    /// The handler can never apply this message: a dead letter.
    async fn give_up<E: Event + Clone + PartialEq>(
        &self,
        single: &Incoming<'_, E>,
        error: &anyhow::Error,
        shutdown: &CancellationToken,
    ) -> bool {
        let poison = [single.poisoned(format!("{error:#}"))];
        let nothing = async |_: &DatabaseTransaction, _: &[Received<E>]| {
            Ok(Handled {
                quarantined: Vec::new(),
                effect: (),
            })
        };
        match self
            .deliver_until_settled(&poison, &nothing, &|()| {}, shutdown)
            .await
        {
            Settled::Committed => true,
            Settled::Shutdown => false,
            Settled::Refused(error) => {
                // Not even the dead letter can be stored. Left alone, it comes again after ack_wait.
                error!(
                    consumer = self.subscription.consumer,
                    error = format!("{error:#}"),
                    "A dead letter cannot be stored"
                );
                true
            }
        }
    }

    async fn deliver_until_settled<E, T>(
        &self,
        batch: &[Incoming<'_, E>],
        handle: &impl AsyncFn(&DatabaseTransaction, &[Received<E>]) -> anyhow::Result<Handled<T>>,
        committed: &impl Fn(T),
        shutdown: &CancellationToken,
    ) -> Settled
    where
        E: Event + Clone + PartialEq,
    {
        let mut retry_delay = RETRY_DELAY_MIN;
        let mut races = 0;
        loop {
            match db::within(DELIVERY_TIMEOUT, self.deliver(batch, handle)).await {
                Ok((effect, dead)) => {
                    self.vital.good();
                    committed(effect);
                    self.acknowledge(batch, &dead).await;
                    return Settled::Committed;
                }
                Err(error) if !is_transient(&error) => return Settled::Refused(error),
                Err(error) => {
                    races = if is_lost_race(&error) { races + 1 } else { 0 };
                    if races == RACES_MAX {
                        return Settled::Refused(error);
                    }
                    if self.vital.bad(format!("{error:#}")) {
                        warn!(
                            consumer = self.subscription.consumer,
                            messages = batch.len(),
                            error = format!("{error:#}"),
                            "A batch could not be stored; trying again"
                        );
                    }
                }
            }
            self.keep_waiting(batch).await;
            shutdown
                .run_until_cancelled(tokio::time::sleep(retry_delay.mul_f64(jitter())))
                .await;
            if shutdown.is_cancelled() {
                return Settled::Shutdown;
            }
            retry_delay = (retry_delay * 2).min(RETRY_DELAY_MAX);
        }
    }

    /// One transaction: inbox rows, effects, dead letters. An error drops it, and nothing has happened.
    async fn deliver<E, T>(
        &self,
        batch: &[Incoming<'_, E>],
        handle: &impl AsyncFn(&DatabaseTransaction, &[Received<E>]) -> anyhow::Result<Handled<T>>,
    ) -> anyhow::Result<(T, HashMap<u64, Verdict>)>
    where
        E: Event + Clone + PartialEq,
    {
        let begun = Instant::now();
        let txn = self.db.begin().await?;
        let deliveries: Vec<Delivery> = batch.iter().filter_map(Incoming::delivery).collect();
        let first = inbox::record(&txn, self.subscription.consumer, &deliveries).await?;
        failpoint!("consumer.after_inbox")?;
        let (events, places) = incoming::distinct(batch, &first);
        let Handled {
            quarantined,
            effect,
        } = handle(&txn, &events).await?;
        failpoint!("consumer.after_handle")?;

        let quarantined: HashMap<usize, String> = quarantined
            .into_iter()
            .map(|one| (one.index, one.cause))
            .collect();
        let dead: Vec<DeadMessage<'_>> = batch
            .iter()
            .zip(places)
            .filter_map(|(incoming, place)| {
                incoming.dead(place.and_then(|place| quarantined.get(&place)))
            })
            .collect();
        dead_letter::bury(&txn, &self.subscription, &dead).await?;
        failpoint!("consumer.before_commit")?;
        txn.commit().await?;
        failpoint!("consumer.after_commit")?;

        let consumer = self.subscription.consumer;
        histogram!(measure::TRANSACTION_SECONDS, "work" => consumer).record(begun.elapsed());
        counter!(measure::MESSAGES, "consumer" => consumer, "result" => "first")
            .increment(first.len() as u64);
        let repeated = deliveries.len().saturating_sub(first.len()) as u64;
        counter!(measure::MESSAGES, "consumer" => consumer, "result" => "repeated")
            .increment(repeated);
        counter!(measure::MESSAGES, "consumer" => consumer, "result" => "dead")
            .increment(dead.len() as u64);
        for letter in &dead {
            error!(
                consumer = self.subscription.consumer,
                event.id = letter.event_id.map(tracing::field::display),
                order.id = letter.order_id.map(tracing::field::display),
                cause = letter.verdict.cause(),
                "Dead letter: a message was not applied"
            );
        }
        let verdicts = dead
            .into_iter()
            .filter_map(|letter| {
                Some((u64::try_from(letter.stream_sequence).ok()?, letter.verdict))
            })
            .collect();
        Ok((effect, verdicts))
    }

    /// Only ever called after the commit: a crash before it leaves the messages to be delivered again, a crash
    /// after it makes them repetitions. All acks of a connection are taken in order, so the answer to the last one
    /// says that the others have been taken too; waiting for each would cost a round trip a message.
    async fn acknowledge<E>(&self, batch: &[Incoming<'_, E>], dead: &HashMap<u64, Verdict>) {
        let Some((last, others)) = batch.split_last() else {
            return;
        };
        for incoming in others {
            let result = match dead.get(&incoming.stream_sequence) {
                Some(verdict) => self.terminate(incoming.message, verdict).await,
                None => incoming
                    .message
                    .ack()
                    .await
                    .map_err(anyhow::Error::from_boxed),
            };
            if let Err(error) = result {
                // It comes again and is recognised.
                debug!(error = format!("{error:#}"), "An ack could not be sent");
            }
        }
        if failpoint!("consumer.before_last_ack").is_err() {
            return;
        }
        let result = match dead.get(&last.stream_sequence) {
            Some(verdict) => self.terminate(last.message, verdict).await,
            None => match tokio::time::timeout(LAST_ACK_TIMEOUT, last.message.double_ack()).await {
                Ok(result) => result.map_err(anyhow::Error::from_boxed),
                Err(_) => Err(anyhow::anyhow!("no answer within {LAST_ACK_TIMEOUT:?}")),
            },
        };
        if let Err(error) = result {
            debug!(
                error = format!("{error:#}"),
                "The last ack of a batch was not confirmed"
            );
        }
        if let Err(injected) = failpoint!("consumer.after_ack") {
            debug!(error = %injected, "Nothing is left to fail");
        }
    }

    /// Ends delivery for good and says why. By hand, since the client's `Term` carries no reason.
    async fn terminate(&self, message: &Message, verdict: &Verdict) -> anyhow::Result<()> {
        let reply = message
            .reply
            .clone()
            .context("a JetStream message has a reply subject")?;
        let reason: String = verdict
            .cause()
            .chars()
            .filter(|c| !c.is_control())
            .take(200)
            .collect();
        self.broker
            .client()
            .publish(reply, format!("+TERM {reason}").into())
            .await?;
        Ok(())
    }

    /// While a batch is tried again, tells the broker not to deliver it to somebody else yet.
    async fn keep_waiting<E>(&self, batch: &[Incoming<'_, E>]) {
        for incoming in batch {
            if let Err(error) = incoming.message.ack_with(AckKind::Progress).await {
                debug!(error = %error, "The broker could not be told to wait");
                return;
            }
        }
    }
}

enum Settled {
    Committed,
    Shutdown,
    Refused(anyhow::Error),
}

/// Whether the same batch can succeed later. What is neither a database error nor a lost race is a bug or bad data,
/// and would fail every time.
pub(crate) fn is_transient(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.is::<LostRace>()
            || cause.is::<Injected>()
            || cause.downcast_ref::<DbErr>().is_some_and(db::is_transient)
    })
}

fn is_lost_race(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.is::<LostRace>()
            || cause
                .downcast_ref::<DbErr>()
                .is_some_and(db::is_unique_violation)
    })
}
