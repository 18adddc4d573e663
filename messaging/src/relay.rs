//! Publishes outbox rows and marks exactly those that the broker acknowledged. Knows rows and subjects, no events.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use async_nats::HeaderMap;
use async_nats::jetstream::context::{PublishAckFuture, PublishError, PublishErrorKind};
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::stream;
use futures_util::future::join_all;
use sea_orm::{DatabaseConnection, TransactionTrait};
use serde_json::{Map, Value as Json};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};

use shared_contracts::{SPEC_VERSION, header};

use crate::broker::{Broker, jitter};
use crate::outbox::{self, Acknowledged, Pending};
use crate::topology::{self, Ensured};
use crate::vital::Vital;

/// Rows in one go: enough to hide the round trips, few enough that the row locks are short.
const BATCH_MAX: u32 = 256;
/// The commit that made a row wakes the relay. This is for wake-ups that were lost: another replica died, or we did.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
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

impl Relay {
    /// Publishes until `shutdown`. A batch that was begun is finished; only waits are cut short.
    pub async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        let mut retry_delay = RETRY_DELAY_MIN;
        let mut streams_known = false;
        while !shutdown.is_cancelled() {
            if !self.broker.is_connected() {
                self.vital.bad("the broker is away; orders are kept and published when it returns");
                streams_known = false;
                shutdown.run_until_cancelled(self.broker.until_connected()).await;
                continue;
            }
            let outcome = match streams_known {
                true => self.publish_batch().await,
                false => self.ensure_streams().await.map(|()| Step::default()),
            };
            match outcome {
                Ok(step) if step.failed == 0 => {
                    self.vital.good();
                    retry_delay = RETRY_DELAY_MIN;
                    if streams_known && step.published == 0 {
                        // A commit that came during the step has left a permit, so no wake-up is lost.
                        shutdown.run_until_cancelled(tokio::time::timeout(POLL_INTERVAL, self.wake.notified())).await;
                    }
                    streams_known = true;
                    continue;
                }
                Ok(step) => {
                    self.vital.bad(format!("{} messages could not be published", step.failed));
                    streams_known = !step.stream_missing;
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
        let answers = join_all(sent.into_iter().map(PublishAckFuture::into_future)).await;

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
        txn.commit().await.context("published rows cannot be marked")?;

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

    async fn ensure_streams(&self) -> anyhow::Result<()> {
        for stream in &self.streams {
            // Found or made, it is there.
            let _: Ensured = topology::ensure_stream(self.broker.jetstream(), stream).await?;
        }
        Ok(())
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
                if let Json::String(value) = value {
                    headers.insert(name, value);
                }
            }
        }
        // The reader will dead-letter it. Written only by `enqueue`, so somebody edited the table.
        Err(error) => error!(event.id = %row.event_id, error = %error, "Outbox row with headers that are no JSON object"),
    }
    headers
}
