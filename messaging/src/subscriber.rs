//! What a service does with the events that it reads.

use shared_contracts::{Event, EventId};

use crate::topology::Subscription;
use crate::transaction::Transaction;

/// Reads one subscription and applies its events to the database of its service.
pub trait Subscriber: Send + Sync + 'static {
    type Event: Event + Clone + PartialEq;
    /// What a batch changed, for [`committed`](Self::committed) and [`describe`](Self::describe).
    type Effect: Send;

    const SUBSCRIPTION: Subscription;

    /// Names the row that the handler locks for an event, for example its account.
    ///
    /// If that row is not to be had, because another transaction holds it or the database refuses
    /// it for now, the events with this key are deferred and applied in stream order later. Events
    /// with other keys do not wait for them.
    fn ordering_key(event: &Self::Event) -> String {
        event.key().to_string()
    }

    /// Applies a batch, in stream order, inside `txn`, which already holds the inbox rows.
    ///
    /// It may read, write and enqueue further messages. It may run again, after a rollback or
    /// because a message came twice, and must take effect once. It does not commit, acknowledge,
    /// publish or call anybody over the network, and keeps nothing outside the transaction: what
    /// must happen after the commit goes into the effect. An error rolls the whole batch back.
    fn handle(
        &self,
        txn: &Transaction,
        batch: &[Received<Self::Event>],
    ) -> impl Future<Output = anyhow::Result<Handled<Self::Effect>>> + Send;

    /// Called once the transaction has committed: count, wake whoever waits.
    fn committed(&self, effect: Self::Effect);

    /// Says in one sentence what applying a single message again changed; `None` if nothing. For
    /// the replay of dead letters.
    fn describe(&self, effect: &Self::Effect) -> Option<String>;
}

/// A message that was understood.
#[derive(Clone, Debug)]
pub struct Received<E> {
    pub event: E,
    /// The same each time the event is published.
    pub event_id: EventId,
    /// 0 for the first request, n for the n-th re-ask.
    pub ask: u32,
    /// Whether the inbox had not seen the event. A hint: effects are guarded by business rows.
    pub first: bool,
    /// W3C trace context of whoever caused the event.
    pub traceparent: Option<String>,
}

/// What a handler did with a batch.
#[derive(Debug)]
pub struct Handled<T> {
    pub effect: T,
    /// Messages that contradict what is decided. They become dead letters; the others take effect.
    pub quarantined: Vec<Quarantined>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quarantined {
    /// Index in the slice that the handler was given.
    pub index: usize,
    /// What contradicts what.
    pub cause: String,
}

/// Lost a race: another transaction inserted the row first. The whole batch runs again and sees it.
#[derive(Debug, thiserror::Error)]
#[error("lost a race for {0}; the batch runs again")]
pub struct LostRace(pub &'static str);
