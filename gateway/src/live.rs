//! Follows the broker's order events with one consumer per process, and sends each to the listeners
//! with a matching filter. While nobody listens, it reads the new events once a second instead, so
//! that not every event wakes it up.
//!
//! A payload is decoded completely only if a listener wants it. Each listener has a bounded queue:
//! a slow one is disconnected and delays no other. A client that resumes reads missed events from
//! the broker's stream, so any gateway can serve it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use async_nats::jetstream;
use async_nats::jetstream::consumer::pull::{self, MessagesErrorKind};
use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy};
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::stream::Stream;
use async_nats::{HeaderMap, StatusCode};
use broker::{ANSWER_TIMEOUT, Broker};
use futures_util::StreamExt as _;
use serde_json::json;
use shared_contracts::ORDERS_STREAM;
use time::OffsetDateTime;
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use uuid::Uuid;

use crate::change::{Change, FinalOrders, Position, Status, StoredChange, Subject, position};
use crate::listeners::{Filter, ListenerId, Listeners, Notification};

const SUBJECTS: &str = "gozon.orders.>";
/// A listener that has missed more events than this gets a reset, since reading its orders again is
/// cheaper.
pub(crate) const REPLAY_MAX: u64 = 20_000;
/// Maximum number of messages in one read.
const READ_MAX: u64 = 500;
/// Maximum number of concurrent reads, because after a restart all clients reconnect at once.
const READS_MAX: usize = 16;
const PULL_EXPIRES: Duration = Duration::from_secs(10);
/// Interval of consumer heartbeats. Without them, a deleted stream would look like a quiet one.
const HEARTBEAT: Duration = Duration::from_secs(2);
const MISSING_HEARTBEATS_MAX: u32 = 2;
/// How often the stream's state is checked. A recreated or rolled-back stream may deliver nothing
/// for a long time.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);
/// Interval between two reads while nobody listens. A new listener may get events that are as old.
const QUIET_INTERVAL: Duration = Duration::from_secs(1);
/// After this many events, the listeners get a turn. On a single thread, they would fall behind
/// otherwise.
const YIELD_AFTER: u64 = 16;
/// The broker deletes the consumer this long after its gateway has ended.
const CONSUMER_INACTIVE_MAX: Duration = Duration::from_secs(30);
const RETRY_DELAY: Duration = Duration::from_millis(250);

/// A message of the stream.
struct StoredEvent<'a> {
    sequence: u64,
    headers: Option<&'a HeaderMap>,
    payload: &'a [u8],
    published: OffsetDateTime,
}

/// Cheap to clone.
#[derive(Clone)]
pub(crate) struct Live(Arc<Inner>);

struct Inner {
    broker: Broker,
    state: Mutex<State>,
    reads: Semaphore,
    listener_added: Notify,
    health: RwLock<Result<(), String>>,
}

/// One lock protects all fields. It is also held while an event is sent to listeners, so a new
/// listener knows exactly after which event it starts.
#[derive(Default)]
struct State {
    head: Option<Head>,
    final_orders: FinalOrders,
    listeners: Listeners,
}

/// The queue of one listener. Dropping it unsubscribes.
pub(crate) struct Subscription {
    live: Live,
    filter: Filter,
    id: ListenerId,
    queue: mpsc::Receiver<Arc<Notification>>,
}

impl Subscription {
    /// Waits for the next event. `None` if the listener was too slow and was disconnected.
    pub(crate) async fn next(&mut self) -> Option<Arc<Notification>> {
        self.queue.recv().await
    }

    /// The position that this process has read up to, if the listener's queue is empty.
    pub(crate) fn head_if_caught_up(&self) -> Option<Position> {
        let state = self.live.state();
        state
            .head
            .filter(|_| self.queue.is_empty())
            .map(|head| head.position)
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.live.state().listeners.remove(&self.filter, self.id);
    }
}

/// The last event that this process has read.
#[derive(Clone, Copy, Debug)]
struct Head {
    position: Position,
    /// When the stream was created.
    created_at: OffsetDateTime,
}

impl Live {
    pub(crate) fn new(broker: Broker) -> Self {
        let health = RwLock::new(Err("starting".to_owned()));
        Self(Arc::new(Inner {
            broker,
            state: Mutex::default(),
            reads: Semaphore::new(READS_MAX),
            listener_added: Notify::new(),
            health,
        }))
    }

    /// Subscribes to the events after the returned position. There is none until the broker has
    /// been reached once.
    pub(crate) fn subscribe(&self, filter: Filter) -> (Subscription, Option<Position>) {
        let mut state = self.state();
        let (id, queue) = state.listeners.add(filter.clone());
        let head = state.head.map(|head| head.position);
        drop(state);
        self.0.listener_added.notify_one();
        let subscription = Subscription {
            live: self.clone(),
            filter,
            id,
            queue,
        };
        (subscription, head)
    }

    pub(crate) fn health(&self) -> Result<(), String> {
        self.0
            .health
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Follows the stream until `shutdown`. Retries after every failure.
    pub(crate) async fn run(&self, shutdown: CancellationToken) {
        let following = async {
            loop {
                if !self.0.broker.is_connected() {
                    self.set_unhealthy("the broker is not connected");
                    self.0.broker.until_connected().await;
                }
                let followed = if self.state().listeners.is_empty() {
                    self.follow_quietly().await
                } else {
                    self.follow().await
                };
                if let Err(error) = followed {
                    self.set_unhealthy(&format!("{error:#}"));
                    tokio::time::sleep(RETRY_DELAY).await;
                }
            }
        };
        shutdown.run_until_cancelled(following).await;
    }

    fn set_unhealthy(&self, why: &str) {
        let mut health = self
            .0
            .health
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if health.as_ref().err().is_none_or(|before| before != why) {
            info!(why, "Order events are not followed; retrying");
        }
        *health = Err(why.to_owned());
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Follows the stream until nobody listens, or until an event may have been missed. The error
    /// says why.
    async fn follow(&self) -> anyhow::Result<()> {
        let connection_number = self.0.broker.connection_number();
        let mut stream = self.stream().await?;
        let created_at = stream.cached_info().created;
        let from = self.resume_position(&stream).await?;
        let mut messages = self.pull(&stream, from).await?;
        self.set_healthy();
        let mut check = tokio::time::interval(CHECK_INTERVAL);
        let (mut taken, mut missing_heartbeats) = (0, 0);
        loop {
            tokio::select! {
                message = messages.next() => match message.context("the subscription ended")? {
                    Ok(message) => {
                        let info = message.info().map_err(anyhow::Error::from_boxed)?;
                        let number = info.consumer_sequence;
                        ensure!(
                            number == taken + 1,
                            "a message is missing between {taken} and {number}"
                        );
                        (taken, missing_heartbeats) = (number, 0);
                        let event = StoredEvent {
                            sequence: info.stream_sequence,
                            headers: message.headers.as_ref(),
                            payload: &message.payload,
                            published: info.published,
                        };
                        self.handle(&event, created_at);
                        if taken % YIELD_AFTER == 0 {
                            tokio::task::yield_now().await;
                        }
                    }
                    Err(error) if matches!(error.kind(), MessagesErrorKind::MissingHeartbeat) => {
                        missing_heartbeats += 1;
                        ensure!(
                            missing_heartbeats < MISSING_HEARTBEATS_MAX,
                            "no heartbeat from the consumer, which may be deleted"
                        );
                    }
                    Err(error) => return Err(error.into()),
                },
                _ = check.tick() => {
                    self.check(&mut stream, created_at).await?;
                    if self.state().listeners.is_empty() {
                        return Ok(());
                    }
                }
                () = self.0.broker.until_reconnected(connection_number) => {
                    bail!("the connection to the broker was replaced")
                }
            }
        }
    }

    /// Reads the new events once in a while, without a consumer, until somebody listens.
    async fn follow_quietly(&self) -> anyhow::Result<()> {
        let connection_number = self.0.broker.connection_number();
        let mut stream = self.stream().await?;
        let created_at = stream.cached_info().created;
        let mut here = self.resume_position(&stream).await?.sequence;
        self.set_healthy();
        let mut check = tokio::time::interval(CHECK_INTERVAL);
        loop {
            tokio::select! {
                () = tokio::time::sleep(QUIET_INTERVAL) => loop {
                    let messages = self.read(here + 1, READ_MAX).await?;
                    for message in &messages {
                        here = message.sequence;
                        let event = StoredEvent {
                            sequence: message.sequence,
                            headers: Some(&message.headers),
                            payload: &message.payload,
                            published: message.time,
                        };
                        self.handle(&event, created_at);
                    }
                    if (messages.len() as u64) < READ_MAX {
                        break;
                    }
                },
                _ = check.tick() => self.check(&mut stream, created_at).await?,
                () = self.0.listener_added.notified() => return Ok(()),
                () = self.0.broker.until_reconnected(connection_number) => {
                    bail!("the connection to the broker was replaced")
                }
            }
        }
    }

    async fn stream(&self) -> anyhow::Result<Stream> {
        let jetstream = self.0.broker.jetstream();
        let stream = jetstream.get_stream(ORDERS_STREAM).await;
        stream.context("stream ORDERS cannot be looked up")
    }

    /// Fails if the stream is not the one that was followed.
    async fn check(&self, stream: &mut Stream, created_at: OffsetDateTime) -> anyhow::Result<()> {
        let info = stream.info().await;
        let info = info.context("stream ORDERS cannot be looked up")?;
        ensure!(info.created == created_at, "stream ORDERS was recreated");
        let last = info.state.last_sequence;
        let here = self.state().head.map_or(0, |head| head.position.sequence);
        ensure!(
            last >= here,
            "stream ORDERS was rolled back from {here} to {last}"
        );
        Ok(())
    }

    fn set_healthy(&self) {
        let health = self.0.health.write();
        *health.unwrap_or_else(PoisonError::into_inner) = Ok(());
    }

    /// Where to resume: at the last event that was read, if the stream still has it. Otherwise
    /// resets all listeners and resumes at the end of the stream.
    async fn resume_position(&self, stream: &Stream) -> anyhow::Result<Position> {
        let info = stream.cached_info();
        let known = self.state().head;
        if let Some(Head {
            position: known,
            created_at,
        }) = known
        {
            let there = match known.event_id {
                Some(_) => self.find(known.sequence).await? == Some(known),
                None => created_at == info.created && info.state.last_sequence >= known.sequence,
            };
            if there {
                return Ok(known);
            }
            warn!(
                position = %known,
                "Stream ORDERS no longer has the last event that was read; resetting all listeners"
            );
        }
        let last = info.state.last_sequence;
        let mut final_changes = Vec::new();
        let mut here = Position {
            sequence: last,
            event_id: None,
        };
        let mut next = info
            .state
            .first_sequence
            .max(last.saturating_sub(REPLAY_MAX) + 1);
        while next <= last {
            let messages = self.read(next, READ_MAX).await?;
            let Some(newest) = messages.last() else { break };
            next = newest.sequence + 1;
            for message in messages {
                if message.sequence == last {
                    here = position(last, Some(&message.headers));
                }
                if let Some(change) = change_of(&message).filter(Change::is_final) {
                    final_changes.push((change.order_id, message.sequence));
                }
            }
        }
        let mut state = self.state();
        state.final_orders.move_all_to_start();
        final_changes
            .into_iter()
            .for_each(|(order_id, sequence)| state.final_orders.record(order_id, sequence));
        state.head = Some(Head {
            position: here,
            created_at: info.created,
        });
        state.listeners.reset_all(here);
        Ok(here)
    }

    /// Creates an ephemeral consumer, in memory and without acks. If a delivery is missing,
    /// [`Self::follow`] fails, and the next attempt creates a new consumer.
    async fn pull(&self, stream: &Stream, after: Position) -> anyhow::Result<pull::Stream> {
        let config = pull::Config {
            // Needs a name, because the permissions check the name in the request's subject.
            name: Some(format!("gateway-{}", Uuid::new_v4().simple())),
            filter_subject: SUBJECTS.to_owned(),
            deliver_policy: DeliverPolicy::ByStartSequence {
                start_sequence: after.sequence + 1,
            },
            ack_policy: AckPolicy::None,
            inactive_threshold: CONSUMER_INACTIVE_MAX,
            memory_storage: true,
            num_replicas: 1,
            ..Default::default()
        };
        let consumer = stream
            .create_consumer(config)
            .await
            .context("a consumer cannot be created")?;
        consumer
            .stream()
            .max_messages_per_batch(READ_MAX as usize)
            .expires(PULL_EXPIRES)
            .heartbeat(HEARTBEAT)
            .messages()
            .await
            .context("the consumer cannot be pulled from")
    }

    fn handle(&self, event: &StoredEvent<'_>, created_at: OffsetDateTime) {
        let position = position(event.sequence, event.headers);
        let mut state = self.state();
        state.head = Some(Head {
            position,
            created_at,
        });
        let Some(status) = Status::of(event.headers) else {
            return;
        };
        if state.listeners.is_empty() && !status.is_final() {
            return;
        }
        let Some(subject) = Subject::read(event.payload) else {
            return;
        };
        if state
            .final_orders
            .was_final_before(subject.order_id, position.sequence)
        {
            return;
        }
        if status.is_final() {
            state
                .final_orders
                .record(subject.order_id, position.sequence);
        }
        state.listeners.notify(&subject, || {
            let change = Change::read(event.headers, event.payload, event.published)?;
            Some(StoredChange::new(position, change))
        });
    }

    /// A page of the changes after a position that match the filter, and the position where the
    /// page ends. `None` if the stream does not have the given position.
    pub(crate) async fn page_after(
        &self,
        after: Position,
        filter: &Filter,
    ) -> anyhow::Result<Option<(Vec<StoredChange>, Position)>> {
        let _turn = self
            .0
            .reads
            .acquire()
            .await
            .context("the gateway is shutting down")?;
        // Also reads the message at the position, to check that it is still the same event.
        let messages = self.read(after.sequence.max(1), READ_MAX).await?;
        let mut messages = messages.into_iter();
        let found = messages
            .next()
            .map(|message| position(message.sequence, Some(&message.headers)));
        if after.event_id.is_none() || found != Some(after) {
            return Ok(None);
        }
        let (mut page, mut reached) = (Vec::new(), after);
        for message in messages {
            reached = position(message.sequence, Some(&message.headers));
            let wanted =
                Subject::read(&message.payload).is_some_and(|found| filter.matches(&found));
            if let Some(change) = wanted.then(|| change_of(&message)).flatten() {
                page.push(StoredChange::new(reached, change));
            }
        }
        let state = self.state();
        page.retain(|stored| {
            !state
                .final_orders
                .was_final_before(stored.change.order_id, stored.position.sequence)
        });
        Ok(Some((page, reached)))
    }

    async fn find(&self, sequence: u64) -> anyhow::Result<Option<Position>> {
        let found = self.read(sequence, 1).await?;
        Ok(found
            .first()
            .map(|message| position(message.sequence, Some(&message.headers))))
    }

    /// Reads messages in order, from a sequence on, with one request and without a consumer.
    async fn read(&self, from: u64, count: u64) -> anyhow::Result<Vec<StreamMessage>> {
        let client = self.0.broker.client();
        let inbox = client.new_inbox();
        let mut answers = client.subscribe(inbox.clone()).await?;
        let request = json!({ "seq": from, "batch": count, "next_by_subj": SUBJECTS }).to_string();
        client
            .publish_with_reply(
                format!("$JS.API.DIRECT.GET.{ORDERS_STREAM}"),
                inbox,
                request.into(),
            )
            .await?;
        let mut messages: Vec<StreamMessage> = Vec::new();
        loop {
            let answer = tokio::time::timeout(ANSWER_TIMEOUT, answers.next()).await;
            let answer = answer
                .context("the broker does not answer")?
                .context("the broker is not connected")?;
            match answer.status {
                None => messages.push(jetstream::message::StreamMessage::try_from(answer)?),
                // 204 ends a batch; 404 means that there is no message.
                Some(status) if status.as_u16() == 204 || status == StatusCode::NOT_FOUND => {
                    return Ok(messages);
                }
                Some(status) => bail!("the broker answers {status}"),
            }
        }
    }
}

fn change_of(message: &StreamMessage) -> Option<Change> {
    Change::read(Some(&message.headers), &message.payload, message.time)
}
