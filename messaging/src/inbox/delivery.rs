//! Applies a batch, then acknowledges it.
//!
//! A batch is one transaction. If it fails, the batch is halved until the messages that cause the
//! failure are found. A message that can never be applied becomes a dead letter. A message whose
//! row is locked or refused for now is deferred. The others are applied.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::time::Duration;

use anyhow::Context as _;
use async_nats::jetstream::{AckKind, Message};
use broker::Backoff;
use bytes::Bytes;
use failpoint::{failpoint, removed};
use metrics::counter;
use shared_contracts::Event;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use crate::dead_letters::table::{self, DeadMessage, Verdict};
use crate::inbox::acks::ACK;
use crate::inbox::apply::{Applied, BLOCKED_KEYS_MAX, Blame, apply};
use crate::inbox::consumer::{Consumer, Taken};
use crate::inbox::deferred;
use crate::inbox::message::{Incoming, RawMessage};
use crate::metrics::MESSAGES;
use crate::postgres::{sql, within};
use crate::subscriber::Subscriber;
use crate::transaction::{Transaction, Work};

const RETRY_DELAY_MIN: Duration = Duration::from_millis(50);
const RETRY_DELAY_MAX: Duration = Duration::from_secs(1);
/// A transaction that hangs, for example on a dead connection, is aborted and retried on another
/// connection.
const DELIVERY_TIMEOUT: Duration = Duration::from_secs(10);
/// A transaction that loses a race gets a unique violation, and the next attempt sees the row.
/// After this many losses in a row, the table must be damaged.
const RACES_MAX: u32 = 5;
/// Attempts of a whole batch after a transient database error. A deadlock or serialization failure
/// is resolved by then; a row that is refused every time is not.
const TRIES: u32 = 3;
/// Attempts of a batch with a single key whose row is locked: no other key is delayed.
const LOCK_TRIES: u32 = 2;
/// Lock timeout of a part with several keys. It only needs to find the locked row; a part with one
/// key waits as long as a batch.
const PART_LOCK_TIMEOUT: &str = "SET LOCAL lock_timeout = '10ms'";
/// A batch is returned to the broker if the database does not answer for this long. Another replica
/// may reach it.
const KEEP_MAX: Duration = Duration::from_secs(3);

/// Dead letters of a batch, by their sequence in the stream.
type Verdicts = HashMap<i64, Verdict>;

/// Messages of a batch that are applied together.
#[derive(Debug, PartialEq, Eq)]
struct Part {
    /// Indexes in the batch, in stream order.
    indexes: Vec<usize>,
    /// Whether this is the first attempt, with the whole batch.
    is_whole: bool,
}

/// The outcome of applying a part.
enum Attempt {
    Applied,
    Shutdown,
    /// A further try would fail too, or not help soon.
    Failed(Blame),
}

/// A batch that is being settled.
struct Batch<'a, E> {
    messages: &'a [Message],
    incoming: Vec<Incoming<'a, E>>,
}

impl<S: Subscriber> Consumer<S> {
    /// Settles a batch, with as many attempts as necessary.
    pub(super) async fn take(&self, messages: &[Message], shutdown: &CancellationToken) -> Taken {
        if failpoint!("consumer.after_fetch").is_err() {
            // The failpoint drops the batch: it is redelivered.
            return Taken::Settled;
        }
        let batch = Batch {
            messages,
            incoming: messages.iter().map(incoming).collect(),
        };
        if removed!("consumer.ack_after_commit") {
            self.acknowledge(messages.iter().collect(), &HashMap::new())
                .await;
            self.acks.send(&self.broker).await;
        }
        let mut blocked_keys = 0;
        let mut parts = vec![Part {
            indexes: (0..messages.len()).collect(),
            is_whole: true,
        }];
        while let Some(part) = parts.pop() {
            let blame = match self.try_part(&batch, &part, shutdown).await {
                Attempt::Applied => continue,
                Attempt::Failed(blame) => blame,
                Attempt::Shutdown => return Taken::Shutdown,
            };
            let keys = batch.keys::<S>(&part);
            let settled = match &blame {
                Blame::Database(error) => Err(anyhow::anyhow!("{error:#}")),
                // The dead letters of unreadable messages cannot be stored.
                Blame::Row(error) if keys.is_empty() => Err(anyhow::anyhow!("{error:#}")),
                Blame::Row(error) if keys.len() == 1 || blocked_keys >= BLOCKED_KEYS_MAX => {
                    blocked_keys += keys.len();
                    self.defer(&batch, &part, error).await
                }
                Blame::Message(error) if part.indexes.len() == 1 => {
                    self.give_up(&batch, &part, error).await
                }
                Blame::Row(error) | Blame::Message(error) => {
                    if part.is_whole {
                        info!(
                            consumer = Self::NAME,
                            messages = part.indexes.len(),
                            error = format!("{error:#}"),
                            "A batch failed; applying it in smaller parts"
                        );
                    }
                    // The first half runs next, so that a part with one key is applied in stream
                    // order.
                    let (first, second) = part.halves(|index| batch.key::<S>(index));
                    parts.extend([second, first]);
                    Ok(())
                }
            };
            if let Err(error) = settled {
                let why = format!("{error:#}");
                if self.health.bad(&why) {
                    warn!(
                        consumer = Self::NAME,
                        messages = batch.incoming.len(),
                        error = why,
                        "A batch could not be stored; returning it to the broker"
                    );
                }
                return Taken::DatabaseAway(why);
            }
        }
        Taken::Settled
    }

    /// Applies a part in one transaction and retries it while a retry may help.
    async fn try_part(
        &self,
        batch: &Batch<'_, S::Event>,
        part: &Part,
        shutdown: &CancellationToken,
    ) -> Attempt {
        let give_back_at = Instant::now() + KEEP_MAX;
        let mut backoff = Backoff::new(RETRY_DELAY_MIN, RETRY_DELAY_MAX);
        let (mut tries, mut races) = (0, 0);
        loop {
            let error = match within(DELIVERY_TIMEOUT, self.deliver(batch, part)).await {
                Ok(()) => {
                    self.health.good();
                    return Attempt::Applied;
                }
                Err(error) => error,
            };
            tries += 1;
            let blame = Blame::of(error);
            let is_over = match &blame {
                Blame::Message(_) if blame.is_lost_race() => {
                    races += 1;
                    races == RACES_MAX
                }
                Blame::Message(_) => true,
                Blame::Row(_) if removed!("consumer.defer") => false,
                Blame::Row(_) if !part.is_whole => true,
                Blame::Row(_) if blame.is_lock_timeout() => {
                    tries >= LOCK_TRIES || batch.keys::<S>(part).len() > 1
                }
                Blame::Row(_) => tries >= TRIES,
                Blame::Database(_) => Instant::now() >= give_back_at,
            };
            if is_over {
                return Attempt::Failed(blame);
            }
            if let Blame::Database(error) = &blame
                && self.health.bad(format!("{error:#}"))
            {
                warn!(
                    consumer = Self::NAME,
                    messages = part.indexes.len(),
                    error = format!("{error:#}"),
                    "A batch could not be stored; retrying"
                );
            }
            self.extend_ack_wait(batch.messages).await;
            if blame.is_lock_timeout() {
                continue;
            }
            shutdown
                .run_until_cancelled(tokio::time::sleep(backoff.pause()))
                .await;
            if shutdown.is_cancelled() {
                return Attempt::Shutdown;
            }
        }
    }

    /// One transaction stores inbox rows, effects, dead letters, and messages that must stay behind
    /// deferred ones. The acks follow after the commit. An error rolls everything back.
    async fn deliver(&self, batch: &Batch<'_, S::Event>, part: &Part) -> anyhow::Result<()> {
        let txn = self.begin("consumer").await?;
        let (applied, behind) = match self.deliver_in(&txn, batch, part).await {
            Ok(delivered) => delivered,
            Err(error) => {
                // Before the next attempt, which would wait for the locks of this one.
                if let Err(error) = txn.rollback().await {
                    debug!(error = %error, "A rollback failed; its connection is closed");
                }
                return Err(error);
            }
        };
        txn.commit().await?;
        self.after_commit(&applied);
        count(Self::NAME, "deferred", behind);
        let dead = verdicts(applied.dead);
        if let Some(effect) = applied.effect {
            self.subscriber.committed(effect);
        }
        self.acknowledge(batch.messages_of(part), &dead).await;
        Ok(())
    }

    /// Returns also the number of messages that stay behind deferred ones.
    async fn deliver_in<'a>(
        &self,
        txn: &Transaction,
        batch: &Batch<'a, S::Event>,
        part: &Part,
    ) -> anyhow::Result<(Applied<'a, S::Effect>, usize)> {
        if !part.is_whole && batch.keys::<S>(part).len() > 1 {
            txn.execute(sql(PART_LOCK_TIMEOUT, [])).await?;
        }
        let behind = self.behind_deferred(txn, batch, part).await?;
        let now: Cow<'_, [Incoming<'a, S::Event>]> = if part.is_whole && behind.is_empty() {
            Cow::Borrowed(&batch.incoming)
        } else {
            let indexes = part.indexes.iter().filter(|one| !behind.contains(one));
            Cow::Owned(indexes.map(|one| batch.incoming[*one].clone()).collect())
        };
        let applied = self.apply_in(txn, &now).await?;
        let deferrals = behind.iter().filter_map(|one| batch.deferral::<S>(*one));
        deferred::store(txn, Self::NAME, deferrals.collect()).await?;
        Ok((applied, behind.len()))
    }

    /// Indexes of messages whose key has deferred messages. Usually this process knows no such key
    /// and does not query the table.
    async fn behind_deferred(
        &self,
        txn: &Transaction,
        batch: &Batch<'_, S::Event>,
        part: &Part,
    ) -> anyhow::Result<Vec<usize>> {
        if self.deferred_keys.is_empty() {
            return Ok(Vec::new());
        }
        let key = |index: &usize| Some((*index, batch.key::<S>(*index)?));
        let suspects: Vec<(usize, String)> = part
            .indexes
            .iter()
            .filter_map(key)
            .filter(|(_, key)| self.deferred_keys.contains(key))
            .collect();
        if suspects.is_empty() {
            return Ok(Vec::new());
        }
        let keys: HashSet<String> = suspects.iter().map(|(_, key)| key.clone()).collect();
        let keys = deferred::waiting(txn, Self::NAME, keys.into_iter().collect()).await?;
        let behind = suspects.into_iter().filter(|(_, key)| keys.contains(key));
        Ok(behind.map(|(index, _)| index).collect())
    }

    /// Defers the messages of a part: stores and acknowledges them. Messages that cannot be read
    /// become dead letters in the same transaction.
    async fn defer(
        &self,
        batch: &Batch<'_, S::Event>,
        part: &Part,
        error: &anyhow::Error,
    ) -> anyhow::Result<()> {
        let keys = batch.keys::<S>(part);
        info!(
            consumer = Self::NAME,
            messages = part.indexes.len(),
            keys = keys.len(),
            first_key = keys.first(),
            error = format!("{error:#}"),
            "Messages deferred: their row is locked or refused for now"
        );
        let deferrals = part.indexes.iter();
        let deferrals = deferrals.filter_map(|one| batch.deferral::<S>(*one));
        let deferrals: Vec<_> = deferrals.collect();
        let deferred = deferrals.len();
        let unreadable = part.indexes.iter().filter_map(|one| {
            let incoming = &batch.incoming[*one];
            let cause = incoming.content.as_ref().err()?;
            Some(DeadMessage::new(incoming, Verdict::Poison(cause.clone())))
        });
        let dead: Vec<_> = unreadable.collect();
        let store = async {
            let txn = self.begin("defer").await?;
            let copies_to = self.dead_letters.as_ref();
            table::store(&txn, &S::SUBSCRIPTION, copies_to, &dead).await?;
            deferred::store(&txn, Self::NAME, deferrals).await?;
            txn.commit().await?;
            anyhow::Ok(())
        };
        within(DELIVERY_TIMEOUT, store)
            .await
            .context("messages cannot be deferred")?;
        self.deferred_keys.add(keys);
        count(Self::NAME, "deferred", deferred);
        count(Self::NAME, "dead", dead.len());
        for letter in &dead {
            log_dead_letter(Self::NAME, letter);
        }
        self.acknowledge(batch.messages_of(part), &verdicts(dead))
            .await;
        Ok(())
    }

    /// Stores a message that the handler can never apply as a dead letter.
    async fn give_up(
        &self,
        batch: &Batch<'_, S::Event>,
        part: &Part,
        error: &anyhow::Error,
    ) -> anyhow::Result<()> {
        let poison: Vec<_> = part
            .indexes
            .iter()
            .map(|one| batch.incoming[*one].poisoned(format!("{error:#}")))
            .collect();
        let store = async {
            let txn = self.begin("consumer").await?;
            let applied = self.apply_in(&txn, &poison).await?;
            txn.commit().await?;
            anyhow::Ok(applied)
        };
        let applied = within(DELIVERY_TIMEOUT, store)
            .await
            .context("a dead letter cannot be stored")?;
        self.after_commit(&applied);
        self.acknowledge(batch.messages_of(part), &verdicts(applied.dead))
            .await;
        Ok(())
    }

    /// Applies messages inside `txn` and stores those that become dead letters.
    pub(super) async fn apply_in<'a>(
        &self,
        txn: &Transaction,
        batch: &[Incoming<'a, S::Event>],
    ) -> anyhow::Result<Applied<'a, S::Effect>> {
        let applied = apply(txn, &self.subscriber, batch).await?;
        let copies_to = self.dead_letters.as_ref();
        table::store(txn, &S::SUBSCRIPTION, copies_to, &applied.dead).await?;
        Ok(applied)
    }

    /// Begins a transaction; `failpoints` is the prefix of its failpoints.
    pub(super) async fn begin(&self, failpoints: &'static str) -> anyhow::Result<Transaction> {
        let work = Work {
            label: Self::NAME,
            failpoints,
        };
        Ok(self.db.begin_work(work).await?)
    }

    /// Counts the messages of a committed transaction and logs its dead letters.
    pub(super) fn after_commit<T>(&self, applied: &Applied<'_, T>) {
        count(Self::NAME, "first", applied.first);
        count(Self::NAME, "repeated", applied.repeated);
        count(Self::NAME, "dead", applied.dead.len());
        for letter in &applied.dead {
            log_dead_letter(Self::NAME, letter);
        }
    }

    /// Called only after the commit. The acks are sent together with those of the next batches.
    async fn acknowledge(&self, messages: Vec<&Message>, dead: &Verdicts) {
        for message in messages {
            let payload = match verdict(message, dead) {
                Some(verdict) => terminate(verdict),
                None => ACK,
            };
            self.acks.add(message, payload);
        }
        if self.acks.is_full() {
            self.acks.send(&self.broker).await;
        }
    }

    /// Prevents the broker from redelivering a batch to another replica while it is retried.
    async fn extend_ack_wait(&self, messages: &[Message]) {
        for message in messages {
            if let Err(error) = message.ack_with(AckKind::Progress).await {
                debug!(error = %error, "The ack wait could not be extended");
                return;
            }
        }
    }
}

impl<'a, E: Event + Clone> Batch<'a, E> {
    /// The ordering key of a message; `None` if it cannot be decoded.
    fn key<S: Subscriber<Event = E>>(&self, index: usize) -> Option<String> {
        let received = self.incoming[index].content.as_ref().ok()?;
        Some(S::ordering_key(&received.event))
    }

    /// The distinct keys of a part, in stream order.
    fn keys<S: Subscriber<Event = E>>(&self, part: &Part) -> Vec<String> {
        let mut seen = HashSet::new();
        let keys = part.indexes.iter().filter_map(|one| self.key::<S>(*one));
        keys.filter(|key| seen.insert(key.clone())).collect()
    }

    fn deferral<S: Subscriber<Event = E>>(&self, index: usize) -> Option<deferred::Deferral<'a>> {
        let incoming = &self.incoming[index];
        let received = incoming.content.as_ref().ok()?;
        Some(deferred::Deferral {
            raw: incoming.raw,
            ordering_key: S::ordering_key(&received.event),
            event_id: received.event_id.as_uuid(),
            ask: i32::try_from(received.ask).unwrap_or(i32::MAX),
        })
    }

    fn messages_of(&self, part: &Part) -> Vec<&'a Message> {
        part.indexes
            .iter()
            .map(|one| &self.messages[*one])
            .collect()
    }
}

impl Part {
    /// Splits a part into two with half of the keys each, or half of the messages if there is one
    /// key. Each half keeps the stream order.
    fn halves(&self, key: impl Fn(usize) -> Option<String>) -> (Self, Self) {
        let mut numbers: HashMap<Option<String>, usize> = HashMap::new();
        let number = |index: &usize| {
            let next = numbers.len();
            *numbers.entry(key(*index)).or_insert(next)
        };
        let numbered: Vec<usize> = self.indexes.iter().map(number).collect();
        let keys = numbers.len();
        let middle = self.indexes.len() / 2;
        let is_first = |position: usize| match keys {
            1 => position < middle,
            _ => numbered[position] < keys / 2,
        };
        let half = |first: bool| Self {
            indexes: (0..self.indexes.len())
                .filter(|position| is_first(*position) == first)
                .map(|position| self.indexes[position])
                .collect(),
            is_whole: false,
        };
        (half(true), half(false))
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

fn verdicts(dead: Vec<DeadMessage<'_>>) -> Verdicts {
    let dead = dead.into_iter();
    dead.map(|letter| (letter.raw.stream_sequence, letter.verdict))
        .collect()
}

fn verdict<'a>(message: &Message, dead: &'a Verdicts) -> Option<&'a Verdict> {
    if dead.is_empty() {
        return None;
    }
    dead.get(&stream_sequence(message))
}

/// Ends the delivery of a message, with a reason.
fn terminate(verdict: &Verdict) -> Bytes {
    let reason: String = verdict.cause().chars().take(200).collect();
    format!("+TERM {reason}").into()
}

fn count(consumer: &'static str, result: &'static str, number: usize) {
    if number > 0 {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn halves(indexes: &[usize], keys: &[&str]) -> (Vec<usize>, Vec<usize>) {
        let part = Part {
            indexes: indexes.to_vec(),
            is_whole: true,
        };
        let (first, second) = part.halves(|index| Some(keys[index].to_owned()));
        assert!(!first.is_whole && !second.is_whole);
        (first.indexes, second.indexes)
    }

    #[test]
    fn halves_separate_keys_and_keep_the_order_of_each() {
        let keys = ["a", "b", "a", "c", "b", "a"];
        let all = [0, 1, 2, 3, 4, 5];
        assert_eq!(halves(&all, &keys), (vec![0, 2, 5], vec![1, 3, 4]));
        assert_eq!(halves(&[1, 3, 4], &keys), (vec![1, 4], vec![3]));
        assert_eq!(halves(&[0, 2, 5], &keys), (vec![0], vec![2, 5]));
    }
}
