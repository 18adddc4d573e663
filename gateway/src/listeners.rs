//! Who listens to which order events. Each listener has a bounded queue and gets only the events that it wants.

use std::collections::HashMap;
use std::sync::Arc;

use shared_contracts::{OrderId, UserId};
use tokio::sync::mpsc;

use crate::change::{Position, Subject};
use crate::live::StoredChange;

/// Events that wait for one listener: a few seconds of full load. They are shared, so each costs a listener 8 bytes.
const QUEUE: usize = 8192;

/// The events that a listener wants.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Filter {
    All,
    User(UserId),
    Order(OrderId),
}

impl Filter {
    pub(crate) fn wants(&self, subject: &Subject) -> bool {
        match self {
            Self::All => true,
            Self::User(user_id) => subject.user_id == *user_id,
            Self::Order(order_id) => subject.order_id == *order_id,
        }
    }
}

#[derive(Debug)]
pub(crate) enum News {
    Change(StoredChange),
    /// The stream was recreated or rolled back. Listeners read their orders again and continue from here.
    Reset(Position),
}

/// Identifies a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ListenerId(u64);

struct Listener {
    id: ListenerId,
    queue: mpsc::Sender<Arc<News>>,
}

impl Listener {
    /// False if it must be disconnected: its queue is full.
    fn tell(&self, news: &Arc<News>) -> bool {
        self.queue.try_send(news.clone()).is_ok()
    }
}

#[derive(Default)]
pub(crate) struct Listeners {
    last_id: u64,
    /// No filter without listeners is kept.
    by_filter: HashMap<Filter, Vec<Listener>>,
}

impl Listeners {
    pub(crate) fn add(&mut self, filter: Filter) -> (ListenerId, mpsc::Receiver<Arc<News>>) {
        let (queue, news) = mpsc::channel(QUEUE);
        self.last_id += 1;
        let id = ListenerId(self.last_id);
        self.by_filter
            .entry(filter)
            .or_default()
            .push(Listener { id, queue });
        (id, news)
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

    /// Tells those who want an event about this order of this user. If nobody does, `change` is not called. A listener
    /// whose queue is full is disconnected.
    pub(crate) fn tell(
        &mut self,
        subject: &Subject,
        change: impl FnOnce() -> Option<StoredChange>,
    ) {
        let wanting: Vec<Filter> = [
            Filter::All,
            Filter::Order(subject.order_id),
            Filter::User(subject.user_id.clone()),
        ]
        .into_iter()
        .filter(|filter| self.by_filter.contains_key(filter))
        .collect();
        if wanting.is_empty() {
            return;
        }
        let Some(change) = change() else {
            return;
        };
        let news = Arc::new(News::Change(change));
        for filter in wanting {
            if let Some(listeners) = self.by_filter.get_mut(&filter) {
                listeners.retain(|listener| listener.tell(&news));
                if listeners.is_empty() {
                    self.by_filter.remove(&filter);
                }
            }
        }
    }

    pub(crate) fn reset_all(&mut self, here: Position) {
        let news = Arc::new(News::Reset(here));
        self.by_filter.retain(|_, listeners| {
            listeners.retain(|listener| listener.tell(&news));
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
    fn an_event_is_told_only_to_those_who_want_it() {
        let mut listeners = Listeners::default();
        let (subject, change) = event("alice");
        assert!(listeners.is_empty());
        let user = |user: &str| Filter::User(UserId::parse(user).unwrap());
        let (bob, mut to_bob) = listeners.add(user("bob"));
        listeners.tell(&subject, || {
            unreachable!("nobody wants it, so it is not decoded")
        });
        let (_, mut to_alice) = listeners.add(user("alice"));
        let (_, mut to_order) = listeners.add(Filter::Order(subject.order_id));
        let (_, mut to_all) = listeners.add(Filter::All);
        listeners.tell(&subject, || Some(change));
        for wanted in [&mut to_alice, &mut to_order, &mut to_all] {
            assert!(matches!(*wanted.try_recv().unwrap(), News::Change(_)));
        }
        assert!(to_bob.try_recv().is_err());
        listeners.remove(&user("bob"), bob);
        assert!(!listeners.by_filter.contains_key(&user("bob")));
    }

    #[test]
    fn a_listener_whose_queue_is_full_is_disconnected_and_no_other() {
        let mut listeners = Listeners::default();
        let (_, mut slow) = listeners.add(Filter::All);
        let (_, mut quick) = listeners.add(Filter::All);
        for _ in 0..=QUEUE {
            let (subject, change) = event("alice");
            listeners.tell(&subject, || Some(change));
            quick.try_recv().unwrap();
        }
        for _ in 0..QUEUE {
            slow.try_recv().unwrap();
        }
        assert!(slow.is_closed() && !quick.is_closed());
    }
}
