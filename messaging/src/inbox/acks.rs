//! Acks that are sent together: each one that the broker receives alone wakes it up once.
//!
//! After a crash, messages whose ack was not sent are redelivered. Those that were committed are
//! recognised as repetitions.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_nats::Subject;
use async_nats::jetstream::Message;
use broker::Broker;
use bytes::Bytes;
use failpoint::failpoint;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::debug;

pub(super) const ACK: Bytes = Bytes::from_static(b"+ACK");
/// Minimum time between two sends. An ack after a longer pause is sent at once, while the broker is
/// still active. Far below the time after which the broker redelivers.
const INTERVAL: Duration = Duration::from_millis(100);
/// So many acks are sent at once.
const ACKS_MAX: usize = 64;

/// Acks of one consumer that were not sent yet.
#[derive(Debug, Default)]
pub(crate) struct Acks {
    waiting: Mutex<Waiting>,
    added: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    /// The connection that delivered the messages. On another connection, the stream may be a new
    /// one, and an ack could hit another message with the same sequence.
    connection_number: u64,
    acks: Vec<(Subject, Bytes)>,
}

impl Acks {
    /// Forgets acks for an earlier connection.
    pub(super) fn begin(&self, connection_number: u64) {
        *self.waiting() = Waiting {
            connection_number,
            acks: Vec::new(),
        };
    }

    pub(super) fn add(&self, message: &Message, payload: Bytes) {
        let Some(reply) = message.reply.clone() else {
            return;
        };
        let mut waiting = self.waiting();
        waiting.acks.push((reply, payload));
        if waiting.acks.len() == 1 {
            self.added.notify_one();
        }
    }

    pub(super) fn is_full(&self) -> bool {
        self.waiting().acks.len() >= ACKS_MAX
    }

    /// Sends acks until `shutdown`.
    pub(super) async fn run(&self, broker: &Broker, shutdown: &CancellationToken) {
        let sending = async {
            let mut next_at = Instant::now();
            loop {
                self.added.notified().await;
                tokio::time::sleep_until(next_at).await;
                self.send(broker).await;
                next_at = Instant::now() + INTERVAL;
            }
        };
        shutdown.run_until_cancelled(sending).await;
    }

    pub(super) async fn send(&self, broker: &Broker) {
        let (connection_number, mut acks) = {
            let mut waiting = self.waiting();
            (waiting.connection_number, std::mem::take(&mut waiting.acks))
        };
        let Some(last) = acks.pop() else { return };
        if connection_number != broker.connection_number() || !broker.is_connected() {
            return;
        }
        let client = broker.client();
        for (reply, payload) in acks {
            if let Err(error) = client.publish(reply, payload).await {
                debug!(error = %error, "An ack could not be sent");
                return;
            }
        }
        if failpoint!("consumer.before_last_ack").is_err() {
            return;
        }
        let (reply, payload) = last;
        if let Err(error) = client.publish(reply, payload).await {
            debug!(error = %error, "An ack could not be sent");
        }
        if let Err(injected) = failpoint!("consumer.after_ack") {
            debug!(error = %injected, "Injected failure after the acks: nothing to roll back");
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        // Each change is one operation, so a panic leaves it consistent.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
