//! Subscribers: how a service handles the events of a subscription.

use shared_contracts::{Event, EventId};

use crate::topology::Subscription;
use crate::transaction::Transaction;

/// Reads one subscription and applies its events to the database of its service.
pub trait Subscriber: Send + Sync + 'static {
    type Event: Event + Clone + PartialEq;
    /// The changes of a batch, for [`committed`](Self::committed) and [`describe`](Self::describe).
    type Effect: Send;

    const SUBSCRIPTION: Subscription;

    /// Names the row that the handler locks for an event, for example its account.
    ///
    /// If another transaction has locked that row, or the database refuses it for now, events with
    /// this key are deferred. They are applied later in stream order. Events with other keys are
    /// not delayed.
    fn ordering_key(event: &Self::Event) -> String {
        event.key().to_string()
    }

    /// Applies a batch, in stream order, inside `txn`, which also stores the inbox rows.
    ///
    /// It may read, write and enqueue messages. It may run again, after a rollback or because a
    /// message was redelivered, and must take effect once. It must not commit, acknowledge, publish
    /// or use the network. It must not keep state outside the transaction: what must happen after
    /// the commit goes into the effect. An error rolls the whole batch back.
    fn handle(
        &self,
        txn: &Transaction,
        batch: &[Received<Self::Event>],
    ) -> impl Future<Output = anyhow::Result<Handled<Self::Effect>>> + Send;

    /// Called after the commit: counts metrics and wakes waiting requests.
    fn committed(&self, effect: Self::Effect);

    /// Describes in one sentence what a replay of a dead letter changed; `None` if nothing.
    fn describe(&self, effect: &Self::Effect) -> Option<String>;
}

/// A decoded message.
#[derive(Clone, Debug)]
pub struct Received<E> {
    pub event: E,
    /// The same for each publication of the event.
    pub event_id: EventId,
    /// 0 for the first request, n for the n-th re-ask.
    pub ask: u32,
    /// W3C trace context of the request or message that caused the event.
    pub traceparent: Option<String>,
}

/// The result of handling a batch.
#[derive(Debug)]
pub struct Handled<T> {
    pub effect: T,
    /// Messages that contradict an earlier decision. They become dead letters; the others take
    /// effect.
    pub quarantined: Vec<Quarantined>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quarantined {
    /// Index in the slice that was passed to the handler.
    pub index: usize,
    /// Describes the contradiction.
    pub cause: String,
}

/// Lost a race: another transaction inserted the row first. The whole batch runs again and sees it.
#[derive(Debug, thiserror::Error)]
#[error("lost a race for {0}; the batch runs again")]
pub struct LostRace(pub &'static str);
