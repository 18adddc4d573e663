//! One batch: applied in one transaction, then acknowledged.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::Context as _;
use async_nats::jetstream::{AckKind, Message};
use broker::Backoff;
use failpoint::{failpoint, removed};
use metrics::counter;
use shared_contracts::Event;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};

use crate::dead_letters::table::{self, DeadMessage, Verdict};
use crate::inbox::apply::{Applied, apply, is_lost_race, is_transient};
use crate::inbox::consumer::Consumer;
use crate::inbox::message::{Incoming, RawMessage};
use crate::metrics::MESSAGES;
use crate::postgres::within;
use crate::subscriber::Subscriber;
use crate::transaction::Work;

const RETRY_DELAY_MIN: Duration = Duration::from_millis(50);
const RETRY_DELAY_MAX: Duration = Duration::from_secs(3);
/// A transaction that hangs (a dead connection) is given up and retried on another connection.
const DELIVERY_TIMEOUT: Duration = Duration::from_secs(20);
const LAST_ACK_TIMEOUT: Duration = Duration::from_secs(2);
/// The loser of a race gets a unique violation, and the next try sees the row. Losing this often in
/// a row means that no try will ever see it: the table is damaged. Then only the message that meets
/// the row is held back.
const RACES_MAX: u32 = 5;

/// What became of a batch.
enum Delivery {
    Committed,
    Shutdown,
    /// It can never be applied as it is.
    Refused(anyhow::Error),
}

/// Dead letters of a batch, by their sequence in the stream.
type Verdicts = HashMap<i64, Verdict>;

impl<S: Subscriber> Consumer<S> {
    /// Takes a batch, however often that has to be tried. Returns false if a shutdown came first:
    /// the messages were not acknowledged and are delivered again.
    pub(super) async fn take(&self, messages: &[Message], shutdown: &CancellationToken) -> bool {
        if failpoint!("consumer.after_fetch").is_err() {
            // As if the batch had never come: it is delivered again.
            return true;
        }
        let batch: Vec<Incoming<'_, S::Event>> = messages.iter().map(incoming).collect();
        if removed!("consumer.ack_after_commit") {
            self.acknowledge(messages, &HashMap::new()).await;
        }
        let error = match self.deliver_until_settled(messages, &batch, shutdown).await {
            Delivery::Committed => return true,
            Delivery::Shutdown => return false,
            Delivery::Refused(error) => error,
        };
        if let ([message], [single]) = (messages, batch.as_slice()) {
            return self.give_up(message, single, &error, shutdown).await;
        }
        // One message spoils the batch: run singly, only the guilty one is held back.
        warn!(
            consumer = Self::NAME,
            messages = batch.len(),
            error = format!("{error:#}"),
            "A batch failed; applying its messages one by one"
        );
        for (message, single) in messages.iter().zip(&batch) {
            let (one, only) = (std::slice::from_ref(message), std::slice::from_ref(single));
            let goes_on = match self.deliver_until_settled(one, only, shutdown).await {
                Delivery::Committed => true,
                Delivery::Shutdown => false,
                Delivery::Refused(error) => self.give_up(message, single, &error, shutdown).await,
            };
            if !goes_on {
                return false;
            }
        }
        true
    }

    /// The handler can never apply this message: it becomes a dead letter.
    async fn give_up(
        &self,
        message: &Message,
        single: &Incoming<'_, S::Event>,
        error: &anyhow::Error,
        shutdown: &CancellationToken,
    ) -> bool {
        let poison = [single.poisoned(format!("{error:#}"))];
        let message = std::slice::from_ref(message);
        match self.deliver_until_settled(message, &poison, shutdown).await {
            Delivery::Committed => true,
            Delivery::Shutdown => false,
            Delivery::Refused(error) => {
                // Not acknowledged, it comes again after ack_wait.
                error!(
                    consumer = Self::NAME,
                    error = format!("{error:#}"),
                    "A dead letter cannot be stored"
                );
                true
            }
        }
    }

    async fn deliver_until_settled(
        &self,
        messages: &[Message],
        batch: &[Incoming<'_, S::Event>],
        shutdown: &CancellationToken,
    ) -> Delivery {
        let mut backoff = Backoff::new(RETRY_DELAY_MIN, RETRY_DELAY_MAX);
        let mut races = 0;
        loop {
            match within(DELIVERY_TIMEOUT, self.deliver(batch)).await {
                Ok((effect, dead)) => {
                    self.health.good();
                    if let Some(effect) = effect {
                        self.subscriber.committed(effect);
                    }
                    self.acknowledge(messages, &dead).await;
                    return Delivery::Committed;
                }
                Err(error) if !is_transient(&error) => return Delivery::Refused(error),
                Err(error) => {
                    races = if is_lost_race(&error) { races + 1 } else { 0 };
                    if races == RACES_MAX {
                        return Delivery::Refused(error);
                    }
                    if self.health.bad(format!("{error:#}")) {
                        warn!(
                            consumer = Self::NAME,
                            messages = batch.len(),
                            error = format!("{error:#}"),
                            "A batch could not be stored; trying again"
                        );
                    }
                }
            }
            self.extend_ack_wait(messages).await;
            shutdown
                .run_until_cancelled(tokio::time::sleep(backoff.pause()))
                .await;
            if shutdown.is_cancelled() {
                return Delivery::Shutdown;
            }
        }
    }

    /// One transaction: inbox rows, effects, dead letters. An error drops it, and nothing happened.
    async fn deliver(
        &self,
        batch: &[Incoming<'_, S::Event>],
    ) -> anyhow::Result<(Option<S::Effect>, Verdicts)> {
        let work = Work {
            label: Self::NAME,
            failpoints: "consumer",
        };
        let txn = self.db.begin_work(work).await?;
        let applied = apply(&txn, &self.subscriber, batch).await?;
        let copies_to = self.dead_letters.as_ref();
        table::store(&txn, &S::SUBSCRIPTION, copies_to, &applied.dead).await?;
        txn.commit().await?;
        count(Self::NAME, &applied);
        for letter in &applied.dead {
            log_dead_letter(Self::NAME, letter);
        }
        let verdicts = applied.dead.into_iter();
        let verdicts = verdicts.map(|letter| (letter.raw.stream_sequence, letter.verdict));
        Ok((applied.effect, verdicts.collect()))
    }

    /// Called only after the commit: a crash before it leaves the messages to be delivered again, a
    /// crash after it makes them repetitions. The acks of a connection are processed in order, so
    /// the answer to the last one confirms the others too; waiting for each would cost a round trip
    /// per message.
    async fn acknowledge(&self, messages: &[Message], dead: &Verdicts) {
        let Some((last, others)) = messages.split_last() else {
            return;
        };
        for message in others {
            let result = match verdict(message, dead) {
                Some(verdict) => self.terminate(message, verdict).await,
                None => message.ack().await.map_err(anyhow::Error::from_boxed),
            };
            if let Err(error) = result {
                // It comes again and is recognised.
                debug!(error = format!("{error:#}"), "An ack could not be sent");
            }
        }
        if failpoint!("consumer.before_last_ack").is_err() {
            return;
        }
        let result = match verdict(last, dead) {
            Some(verdict) => self.terminate(last, verdict).await,
            None => match tokio::time::timeout(LAST_ACK_TIMEOUT, last.double_ack()).await {
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

    /// Ends the delivery of a message and says why. By hand, since the client's `Term` carries no
    /// reason.
    async fn terminate(&self, message: &Message, verdict: &Verdict) -> anyhow::Result<()> {
        let reply = message
            .reply
            .clone()
            .context("a JetStream message has a reply subject")?;
        let reason: String = verdict.cause().chars().take(200).collect();
        self.broker
            .client()
            .publish(reply, format!("+TERM {reason}").into())
            .await?;
        Ok(())
    }

    /// While a batch is retried, the broker must not deliver it to another replica.
    async fn extend_ack_wait(&self, messages: &[Message]) {
        for message in messages {
            if let Err(error) = message.ack_with(AckKind::Progress).await {
                debug!(error = %error, "The wait for an ack could not be extended");
                return;
            }
        }
    }
}

fn incoming<E: Event>(message: &Message) -> Incoming<'_, E> {
    let (sequence, delivered) = message
        .info()
        .map_or((0, 0), |info| (info.stream_sequence, info.delivered));
    Incoming::read(RawMessage {
        subject: &message.subject,
        headers: message.headers.as_ref(),
        payload: &message.payload,
        stream_sequence: i64::try_from(sequence).unwrap_or(i64::MAX),
        delivered: i32::try_from(delivered).unwrap_or(i32::MAX),
    })
}

fn stream_sequence(message: &Message) -> i64 {
    let sequence = message.info().map_or(0, |info| info.stream_sequence);
    i64::try_from(sequence).unwrap_or(i64::MAX)
}

fn verdict<'a>(message: &Message, dead: &'a Verdicts) -> Option<&'a Verdict> {
    if dead.is_empty() {
        return None;
    }
    dead.get(&stream_sequence(message))
}

fn count<T>(consumer: &'static str, applied: &Applied<'_, T>) {
    let results = [
        ("first", applied.first),
        ("repeated", applied.repeated),
        ("dead", applied.dead.len()),
    ];
    for (result, number) in results {
        counter!(MESSAGES, "consumer" => consumer, "result" => result).increment(number as u64);
    }
}

fn log_dead_letter(consumer: &'static str, letter: &DeadMessage<'_>) {
    error!(
        consumer,
        event.id = letter.event_id.map(tracing::field::display),
        order.id = letter.key.map(tracing::field::display),
        about = letter.about.map(tracing::field::display),
        cause = letter.verdict.cause(),
        "Dead letter: a message was not applied"
    );
}
