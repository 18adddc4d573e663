//! Publishes outbox rows and marks exactly those that the broker acknowledged. Knows rows and subjects, no events.

use std::collections::HashMap;
use std::str::FromStr as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use async_nats::jetstream::context::{PublishAckFuture, PublishError, PublishErrorKind};
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::stream;
use async_nats::{HeaderMap, HeaderName, HeaderValue};
use failpoint::failpoint;
use futures_util::future::join_all;
use sea_orm::{DatabaseConnection, TransactionTrait};
use serde_json::{Map, Value as Json};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};

use shared_contracts::{SPEC_VERSION, header};

use crate::broker::{Broker, jitter};
use crate::outbox::{self, Acknowledged, Pending};
use crate::topology::{self, Ensured, StreamState};
use crate::vital::Vital;

/// Rows in one go: enough to hide the round trips, few enough that the row locks are short.
const BATCH_MAX: u32 = 256;
/// The commit that made a row wakes the relay. This is for wake-ups that were lost: another replica died, or we did.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// While nothing fails, the streams are looked at this often: nobody tells a relay that is idle that they are gone.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);
const RETRY_DELAY_MIN: Duration = Duration::from_millis(100);
const RETRY_DELAY_MAX: Duration = Duration::from_secs(5);

/// Moves outbox rows of one database to the broker. Any number may run on the same table.
pub struct Relay {
    /// Pool of the flow, not of the HTTP side.
    pub db: DatabaseConnection,
    /// Where to publish.
    pub broker: Broker,
    /// Streams this service owns; the relay makes them when they are absent.
    pub streams: Vec<stream::Config>,
    /// Notified after every commit that enqueued something.
    pub wake: Arc<Notify>,
    /// Notified when the broker is found to have lost what it had acknowledged.
    pub lost: Arc<Notify>,
    /// How it goes.
    pub vital: Vital,
}

/// What one step did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// Rows acknowledged and marked.
    pub published: usize,
    /// Rows that stay for another try.
    pub failed: usize,
    /// Whether some failed because nobody stores their subject: the stream is gone.
    pub stream_missing: bool,
}

/// What is known of the service's streams: a hint, to notice early what the reconciler would notice late.
#[derive(Debug, Default)]
struct Streams {
    /// Looked at on this connection, at this time.
    looked: Option<(u64, Instant)>,
    states: HashMap<String, StreamState>,
}

impl Streams {
    fn are_known(&self, connection_number: u64) -> bool {
        self.looked.is_some_and(|(number, at)| number == connection_number && at.elapsed() < LOOK_INTERVAL)
    }
}

impl Relay {
    /// Publishes until `shutdown`. A batch that was begun is finished; only waits are cut short.
    pub async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        let mut retry_delay = RETRY_DELAY_MIN;
        let mut streams = Streams::default();
        while !shutdown.is_cancelled() {
            if !self.broker.is_connected() {
                self.vital.bad("the broker is away; orders are kept and published when it returns");
                shutdown.run_until_cancelled(self.broker.until_connected()).await;
                continue;
            }
            let looked = match streams.are_known(self.broker.connection_number()) {
                true => Ok(()),
                false => self.look_at_streams(&mut streams).await,
            };
            let outcome = match (self.publish_batch().await, looked) {
                // What could be published is; the trouble with a stream is told, and looked at again after a pause.
                (Ok(_), Err(error)) => Err(error),
                (outcome, _) => outcome,
            };
            match outcome {
                Ok(step) if step.failed == 0 => {
                    self.vital.good();
                    retry_delay = RETRY_DELAY_MIN;
                    if step.published == 0 {
                        // A commit that came during the step has left a permit, so no wake-up is lost.
                        shutdown.run_until_cancelled(tokio::time::timeout(POLL_INTERVAL, self.wake.notified())).await;
                    }
                    continue;
                }
                Ok(step) => {
                    self.vital.bad(format!("{} messages could not be published", step.failed));
                    if step.stream_missing {
                        streams.looked = None;
                    }
                }
                Err(error) => {
                    if self.vital.bad(format!("{error:#}")) {
                        warn!(error = format!("{error:#}"), "Publishing does not work; trying again");
                    }
                }
            }
            shutdown.run_until_cancelled(tokio::time::sleep(retry_delay.mul_f64(jitter()))).await;
            retry_delay = (retry_delay * 2).min(RETRY_DELAY_MAX);
        }
        Ok(())
    }

    /// One step: takes a batch of waiting rows, publishes them side by side, marks those whose PubAck came.
    ///
    /// The transaction stays open while the broker answers, because it holds the rows' locks: another relay passes
    /// over them (SKIP LOCKED), so a row is published by one relay at a time without leases or clocks. No other
    /// transaction ever wants these locks, and the broker's answer has a time limit, so nothing waits long. If this
    /// process dies, the server frees the rows and the next relay publishes them again under the same message id.
    pub async fn publish_batch(&self) -> anyhow::Result<Step> {
        let txn = self.db.begin().await.context("the outbox cannot be read")?;
        let rows = outbox::lock_pending(&txn, BATCH_MAX).await.context("the outbox cannot be read")?;
        if rows.is_empty() {
            txn.rollback().await.context("the outbox cannot be read")?;
            return Ok(Step::default());
        }
        failpoint!("relay.after_take")?;
        let mut sent = Vec::with_capacity(rows.len());
        let mut first_error = None;
        for row in &rows {
            match self.send(row).await {
                Ok(acknowledgement) => sent.push(acknowledgement),
                // The connection takes no more. The rest of the batch would wait just as long, one by one.
                Err(error) => {
                    first_error = Some(error);
                    break;
                }
            }
        }
        failpoint!("relay.after_send")?;
        let answers = join_all(sent.into_iter().map(PublishAckFuture::into_future)).await;
        failpoint!("relay.after_puback")?;

        let mut step = Step::default();
        let mut acknowledged = Vec::with_capacity(rows.len());
        let mut unacknowledged = Vec::new();
        for (row, answer) in rows.iter().zip(answers) {
            match answer {
                // A duplicate was stored before and its ack lost: just as good.
                Ok(ack) => {
                    let stream_sequence = i64::try_from(ack.sequence).context("a stream sequence above 2^63")?;
                    acknowledged.push(Acknowledged { event_id: row.event_id, n: row.n, stream_sequence });
                }
                Err(error) => {
                    step.stream_missing |= error.kind() == PublishErrorKind::StreamNotFound;
                    unacknowledged.push((row.event_id, row.n));
                    first_error.get_or_insert(error);
                }
            }
        }
        outbox::mark_published(&txn, &acknowledged).await.context("published rows cannot be marked")?;
        outbox::count_attempt(&txn, &unacknowledged).await.context("attempts cannot be counted")?;
        failpoint!("relay.before_commit")?;
        txn.commit().await.context("published rows cannot be marked")?;
        failpoint!("relay.after_commit")?;

        step.published = acknowledged.len();
        step.failed = rows.len() - acknowledged.len();
        match first_error {
            None => debug!(published = step.published, "Outbox rows published"),
            Some(error) => {
                warn!(published = step.published, failed = step.failed, error = %error, "Some outbox rows could not be published; they stay");
            }
        }
        Ok(step)
    }

    async fn send(&self, row: &Pending) -> Result<PublishAckFuture, PublishError> {
        let message = PublishMessage::build().payload(row.payload.clone().into()).headers(message_headers(row));
        self.broker.jetstream().send_publish(row.subject.clone(), message).await
    }

    /// Makes the service's streams where they are absent, and notices what the broker has lost: a stream that is new
    /// (whoever made it), or that ends before where it ended when it was last looked at.
    async fn look_at_streams(&self, streams: &mut Streams) -> anyhow::Result<()> {
        let number = self.broker.connection_number();
        let mut trouble = None;
        for wanted in &self.streams {
            // One stream that cannot be made must not keep the rows of the others.
            let (state, ensured) = match topology::ensure_stream(self.broker.jetstream(), wanted).await {
                Ok(found) => found,
                Err(error) => {
                    trouble = Some(error);
                    continue;
                }
            };
            let earlier = streams.states.insert(wanted.name.clone(), state);
            let shrunk =
                earlier.is_some_and(|earlier| earlier.made_at != state.made_at || earlier.last_sequence > state.last_sequence);
            if ensured == Ensured::Made || shrunk {
                warn!(
                    stream = wanted.name,
                    "The broker does not have what it had acknowledged, if there was anything; it is asked for again"
                );
                self.lost.notify_one();
            }
        }
        match trouble {
            Some(error) => Err(error),
            None => {
                streams.looked = Some((number, Instant::now()));
                Ok(())
            }
        }
    }
}

/// What the row stores, and what follows from its key.
fn message_headers(row: &Pending) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(header::SPEC_VERSION, SPEC_VERSION);
    headers.insert(header::ID, row.event_id.to_string());
    headers.insert(header::MESSAGE_ID, row.message_id());
    match serde_json::from_str::<Map<String, Json>>(&row.headers) {
        Ok(stored) => {
            for (name, value) in stored {
                // Checked, since the client panics on what is no header.
                match (HeaderName::from_str(&name), value.as_str().map(HeaderValue::from_str)) {
                    (Ok(name), Some(Ok(value))) => headers.insert(name, value),
                    _ => error!(event.id = %row.event_id, header = name, "Outbox row with something that is no header; left out"),
                }
            }
        }
        // The reader will dead-letter it. Written only by `enqueue`, so somebody edited the table.
        Err(error) => error!(event.id = %row.event_id, error = %error, "Outbox row with headers that are no JSON object"),
    }
    headers
}
