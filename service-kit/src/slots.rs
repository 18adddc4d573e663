//! Concurrency limits for requests, connections and event streams. One client alone cannot take all
//! slots.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::problem::{Code, Problem};

/// Metric label: the client already holds the maximum share of one client.
pub const CLIENT_SHARE: &str = "client_share";
/// Metric label: there are too many connections.
pub(crate) const CONNECTIONS: &str = "connections";

/// A limited number of slots. One key may hold at most three quarters of them, so that a quarter is
/// left for others. Cheap to clone.
pub struct Slots<K>(Arc<Inner<K>>);

struct Inner<K> {
    /// Metric label: all slots are taken.
    reason: &'static str,
    max: usize,
    share_max: usize,
    taken: Mutex<Taken<K>>,
}

struct Taken<K> {
    total: usize,
    by_key: HashMap<K, usize>,
}

impl<K: Clone + Eq + Hash> Slots<K> {
    pub fn new(reason: &'static str, max: usize) -> Self {
        Self(Arc::new(Inner {
            reason,
            max,
            share_max: max - max / 4,
            taken: Mutex::new(Taken {
                total: 0,
                by_key: HashMap::new(),
            }),
        }))
    }

    /// Takes a slot for `key`. Dropping the returned value releases it.
    pub fn take(&self, key: K) -> Result<Slot<K>, NoSlot> {
        let mut taken = self.0.taken();
        if taken.total >= self.0.max {
            return Err(NoSlot::AllTaken(self.0.reason));
        }
        if taken.by_key.get(&key).copied().unwrap_or(0) >= self.0.share_max {
            return Err(NoSlot::ShareTaken);
        }
        taken.total += 1;
        *taken.by_key.entry(key.clone()).or_default() += 1;
        drop(taken);
        Ok(Slot {
            slots: self.clone(),
            key,
        })
    }
}

impl<K> Clone for Slots<K> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<K> Inner<K> {
    fn taken(&self) -> MutexGuard<'_, Taken<K>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One slot. Dropping it releases it.
#[must_use]
pub struct Slot<K: Eq + Hash> {
    slots: Slots<K>,
    key: K,
}

impl<K: Eq + Hash> Drop for Slot<K> {
    fn drop(&mut self) {
        let mut taken = self.slots.0.taken();
        taken.total -= 1;
        if let Some(count) = taken.by_key.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                taken.by_key.remove(&self.key);
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoSlot {
    AllTaken(&'static str),
    /// This client already holds the maximum share of one client.
    ShareTaken,
}

impl NoSlot {
    /// The reason as a metric label.
    pub fn reason(self) -> &'static str {
        match self {
            Self::AllTaken(reason) => reason,
            Self::ShareTaken => CLIENT_SHARE,
        }
    }
}

impl From<NoSlot> for Problem {
    fn from(refusal: NoSlot) -> Self {
        let problem = Self::new(Code::Overloaded);
        match refusal {
            NoSlot::AllTaken(_) => problem,
            NoSlot::ShareTaken => {
                problem.because("Too many requests from your address are in progress.")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_client_leaves_a_quarter_of_the_slots_to_others() {
        let slots = Slots::new("test", 8);
        let take = |key: &'static str, count: usize| -> Vec<_> {
            (0..count).map(|_| slots.take(key).unwrap()).collect()
        };
        let mut greedy = take("greedy", 6);
        assert_eq!(slots.take("greedy").err(), Some(NoSlot::ShareTaken));
        let others = take("other", 2);
        assert_eq!(slots.take("third").err(), Some(NoSlot::AllTaken("test")));
        greedy.pop();
        drop(take("third", 1));
        greedy.extend(take("greedy", 1));
        assert_eq!(slots.take("greedy").err(), Some(NoSlot::AllTaken("test")));
        drop((greedy, others));
        assert_eq!(slots.0.taken().total, 0);
        assert!(
            slots.0.taken().by_key.is_empty(),
            "clients without slots are forgotten"
        );
    }

    #[test]
    fn with_fewer_than_four_slots_one_client_may_take_all() {
        assert!(Slots::new("test", 0).take("a").is_err());
        let slots = Slots::new("test", 3);
        let all: Vec<_> = (0..3).map(|_| slots.take("a").unwrap()).collect();
        assert_eq!(slots.take("b").err(), Some(NoSlot::AllTaken("test")));
        drop(all);
    }
}
