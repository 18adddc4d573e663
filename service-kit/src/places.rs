//! Places for what is in progress: requests, connections, event streams. Their number is bounded, and one client cannot
//! hold all of them.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::problem::{Code, Problem};

/// The reason for rejecting a client that holds its share, as a label of metrics.
pub const CLIENT_SHARE: &str = "client_share";

/// A bounded number of places. One key may hold three quarters of them; the rest is a reserve for all others. Cheap to
/// clone.
pub struct Places<K>(Arc<Inner<K>>);

struct Inner<K> {
    /// The reason for rejecting a client if all places are taken, as a label of metrics.
    reason: &'static str,
    max: usize,
    share_max: usize,
    taken: Mutex<Taken<K>>,
}

struct Taken<K> {
    total: usize,
    by_key: HashMap<K, usize>,
}

impl<K: Clone + Eq + Hash> Places<K> {
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

    /// Takes a place for `key` until the returned value is dropped.
    pub fn take(&self, key: K) -> Result<Place<K>, NoPlace> {
        let mut taken = self.0.taken();
        if taken.total >= self.0.max {
            return Err(NoPlace::AllTaken(self.0.reason));
        }
        if taken.by_key.get(&key).copied().unwrap_or(0) >= self.0.share_max {
            return Err(NoPlace::ShareTaken);
        }
        taken.total += 1;
        *taken.by_key.entry(key.clone()).or_default() += 1;
        drop(taken);
        Ok(Place {
            places: self.clone(),
            key,
        })
    }
}

impl<K> Clone for Places<K> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<K> Inner<K> {
    fn taken(&self) -> MutexGuard<'_, Taken<K>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One place. Dropping it gives it back.
#[must_use]
pub struct Place<K: Eq + Hash> {
    places: Places<K>,
    key: K,
}

impl<K: Eq + Hash> Drop for Place<K> {
    fn drop(&mut self) {
        let mut taken = self.places.0.taken();
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
pub enum NoPlace {
    AllTaken(&'static str),
    /// This client holds as many as one client may.
    ShareTaken,
}

impl NoPlace {
    /// The reason as a label of metrics.
    pub fn reason(self) -> &'static str {
        match self {
            Self::AllTaken(reason) => reason,
            Self::ShareTaken => CLIENT_SHARE,
        }
    }
}

impl From<NoPlace> for Problem {
    fn from(refusal: NoPlace) -> Self {
        let problem = Self::new(Code::Overloaded);
        match refusal {
            NoPlace::AllTaken(_) => problem,
            NoPlace::ShareTaken => {
                problem.because("Too many requests from your address are in progress.")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_client_leaves_a_quarter_of_the_places_to_others() {
        let places = Places::new("test", 8);
        let take = |key: &'static str, count: usize| -> Vec<_> {
            (0..count).map(|_| places.take(key).unwrap()).collect()
        };
        let mut greedy = take("greedy", 6);
        assert_eq!(places.take("greedy").err(), Some(NoPlace::ShareTaken));
        let others = take("other", 2);
        assert_eq!(places.take("third").err(), Some(NoPlace::AllTaken("test")));
        greedy.pop();
        drop(take("third", 1));
        greedy.extend(take("greedy", 1));
        assert_eq!(places.take("greedy").err(), Some(NoPlace::AllTaken("test")));
        drop((greedy, others));
        assert_eq!(places.0.taken().total, 0);
        assert!(
            places.0.taken().by_key.is_empty(),
            "nothing is kept of clients that left"
        );
    }

    #[test]
    fn few_places_have_no_reserve() {
        assert!(Places::new("test", 0).take("a").is_err());
        let places = Places::new("test", 3);
        let all: Vec<_> = (0..3).map(|_| places.take("a").unwrap()).collect();
        assert_eq!(places.take("b").err(), Some(NoPlace::AllTaken("test")));
        drop(all);
    }
}
