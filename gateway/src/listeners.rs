//! Listeners and their filters. Each listener has a bounded queue and gets only the events that
//! match its filter.

use std::collections::HashMap;
use std::sync::Arc;

use shared_contracts::{OrderId, UserId};
use tokio::sync::mpsc;

use crate::change::{Position, StoredChange, Subject};

/// Queue length per listener: a few seconds of full load. Listeners share the events, so an entry
/// costs 8 bytes.
const QUEUE: usize = 8192;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Filter {
    All,
    User(UserId),
    Order(OrderId),
}

impl Filter {
    pub(crate) fn matches(&self, subject: &Subject) -> bool {
        match self {
            Self::All => true,
            Self::User(user_id) => subject.user_id == *user_id,
            Self::Order(order_id) => subject.order_id == *order_id,
        }
    }
}

#[derive(Debug)]
pub(crate) enum Notification {
    Change(StoredChange),
    /// The stream was recreated or rolled back. Clients must read their orders again. Events
    /// continue after this position.
    Reset(Position),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ListenerId(u64);

struct Listener {
    id: ListenerId,
    queue: mpsc::Sender<Arc<Notification>>,
}

impl Listener {
    /// Returns false if the queue is full; then the listener must be disconnected.
    fn send(&self, notification: &Arc<Notification>) -> bool {
        self.queue.try_send(notification.clone()).is_ok()
    }
}

#[derive(Default)]
pub(crate) struct Listeners {
    last_id: u64,
    /// A filter is removed with its last listener.
    by_filter: HashMap<Filter, Vec<Listener>>,
}

impl Listeners {
    pub(crate) fn add(
        &mut self,
        filter: Filter,
    ) -> (ListenerId, mpsc::Receiver<Arc<Notification>>) {
        let (queue, receiver) = mpsc::channel(QUEUE);
        self.last_id += 1;
        let id = ListenerId(self.last_id);
        self.by_filter
            .entry(filter)
            .or_default()
            .push(Listener { id, queue });
        (id, receiver)
    }

    pub(crate) fn remove(&mut self, filter: &Filter, id: ListenerId) {
        if let Some(listeners) = self.by_filter.get_mut(filter) {
            listeners.retain(|listener| listener.id != id);
            if listeners.is_empty() {
                self.by_filter.remove(filter);
            }
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.by_filter.is_empty()
    }

    /// Sends a change to the listeners whose filter matches. Calls `change` only if there are any.
    /// Disconnects a listener whose queue is full.
    pub(crate) fn notify(
        &mut self,
        subject: &Subject,
        change: impl FnOnce() -> Option<StoredChange>,
    ) {
        let matching: Vec<Filter> = [
            Filter::All,
            Filter::Order(subject.order_id),
            Filter::User(subject.user_id.clone()),
        ]
        .into_iter()
        .filter(|filter| self.by_filter.contains_key(filter))
        .collect();
        if matching.is_empty() {
            return;
        }
        let Some(change) = change() else {
            return;
        };
        let notification = Arc::new(Notification::Change(change));
        for filter in matching {
            if let Some(listeners) = self.by_filter.get_mut(&filter) {
                listeners.retain(|listener| listener.send(&notification));
                if listeners.is_empty() {
                    self.by_filter.remove(&filter);
                }
            }
        }
    }

    pub(crate) fn reset_all(&mut self, here: Position) {
        let notification = Arc::new(Notification::Reset(here));
        self.by_filter.retain(|_, listeners| {
            listeners.retain(|listener| listener.send(&notification));
            !listeners.is_empty()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::{Change, Status};

    fn event(user: &str) -> (Subject, StoredChange) {
        let subject = Subject {
            order_id: OrderId::mint(),
            user_id: UserId::parse(user).unwrap(),
        };
        let change = Change {
            order_id: subject.order_id,
            user_id: subject.user_id.clone(),
            amount: 1,
            status: Status::New,
            reason: None,
            at: time::OffsetDateTime::UNIX_EPOCH,
        };
        let position = Position {
            sequence: 1,
            event_id: None,
        };
        (subject, StoredChange::new(position, change))
    }

    #[test]
    fn an_event_is_sent_only_to_listeners_with_a_matching_filter() {
        let mut listeners = Listeners::default();
        let (subject, change) = event("alice");
        assert!(listeners.is_empty());
        let user = |user: &str| Filter::User(UserId::parse(user).unwrap());
        let (bob, mut to_bob) = listeners.add(user("bob"));
        listeners.notify(&subject, || {
            unreachable!("no filter matches, so it is not decoded")
        });
        let (_, mut to_alice) = listeners.add(user("alice"));
        let (_, mut to_order) = listeners.add(Filter::Order(subject.order_id));
        let (_, mut to_all) = listeners.add(Filter::All);
        listeners.notify(&subject, || Some(change));
        for wanted in [&mut to_alice, &mut to_order, &mut to_all] {
            assert!(matches!(
                *wanted.try_recv().unwrap(),
                Notification::Change(_)
            ));
        }
        assert!(to_bob.try_recv().is_err());
        listeners.remove(&user("bob"), bob);
        assert!(!listeners.by_filter.contains_key(&user("bob")));
    }

    #[test]
    fn only_a_listener_with_a_full_queue_is_disconnected() {
        let mut listeners = Listeners::default();
        let (_, mut slow) = listeners.add(Filter::All);
        let (_, mut quick) = listeners.add(Filter::All);
        for _ in 0..=QUEUE {
            let (subject, change) = event("alice");
            listeners.notify(&subject, || Some(change));
            quick.try_recv().unwrap();
        }
        for _ in 0..QUEUE {
            slow.try_recv().unwrap();
        }
        assert!(slow.is_closed() && !quick.is_closed());
    }
}
