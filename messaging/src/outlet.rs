//! The short way from a commit to the relay of the same process: what was enqueued is handed over in memory, so that
//! nobody has to look for it in the outbox. The long way stays: what is not handed over (the process died, the outcome of
//! the commit is not known, there was too much), the relay finds in the table a little later.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::outbox::{Enqueued, Pending};

/// Rows that may wait in memory: a few megabytes, and about a second of a busy relay.
const ROWS_MAX: usize = 5000;
/// What waited longer is left to the long way. Well below [`crate::outbox::LOOKED_FOR_AFTER`], or both would publish it: the
/// broker swallows that, but it makes work exactly when there is too much already.
const WAIT_MAX: Duration = Duration::from_millis(700);

/// Where commits hand over what they have enqueued, cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Outlet(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    rows: Mutex<VecDeque<(Instant, Pending)>>,
    come: Notify,
}

impl Outlet {
    /// Only ever after the commit: what the broker has cannot be taken back.
    pub fn hand_over(&self, enqueued: Enqueued) {
        if enqueued.0.is_empty() {
            return;
        }
        let now = Instant::now();
        let mut rows = self.rows();
        if rows.len() + enqueued.0.len() <= ROWS_MAX {
            rows.extend(enqueued.0.into_iter().map(|row| (now, row)));
        }
        drop(rows);
        self.0.come.notify_one();
    }

    /// What was handed over first, at most so much.
    pub(crate) fn take(&self, limit: usize) -> Vec<Pending> {
        let mut rows = self.rows();
        while rows
            .front()
            .is_some_and(|(come, _)| come.elapsed() > WAIT_MAX)
        {
            rows.pop_front();
        }
        let taken = rows.len().min(limit);
        let taken = rows.drain(..taken).map(|(_, row)| row).collect();
        if !rows.is_empty() {
            // For the other lane.
            self.0.come.notify_one();
        }
        taken
    }

    /// Until something is handed over, or was before anyone waited.
    pub(crate) async fn come(&self) {
        self.0.come.notified().await;
    }

    fn rows(&self) -> MutexGuard<'_, VecDeque<(Instant, Pending)>> {
        // Whatever panicked, the queue is whole: each change of it is one step.
        self.0.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outbox::tests::pending;

    fn enqueued(rows: usize) -> Enqueued {
        Enqueued(vec![pending(0); rows])
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_too_much_or_too_old_is_left_to_the_table() {
        let outlet = Outlet::default();
        outlet.hand_over(enqueued(ROWS_MAX - 1));
        outlet.hand_over(enqueued(2));
        assert_eq!(outlet.take(10).len(), 10);
        assert_eq!(
            outlet.take(ROWS_MAX).len(),
            ROWS_MAX - 11,
            "two were too much"
        );

        outlet.hand_over(enqueued(3));
        tokio::time::advance(WAIT_MAX + Duration::from_millis(1)).await;
        outlet.hand_over(enqueued(1));
        assert_eq!(outlet.take(10).len(), 1, "three waited too long");
    }

    #[tokio::test(start_paused = true)]
    async fn who_takes_a_part_wakes_the_next_for_the_rest() {
        let outlet = Outlet::default();
        outlet.hand_over(enqueued(3));
        outlet.come().await;
        assert_eq!(outlet.take(2).len(), 2);
        tokio::time::timeout(Duration::from_secs(1), outlet.come())
            .await
            .unwrap();
        assert_eq!(outlet.take(2).len(), 1);
        assert!(
            tokio::time::timeout(Duration::from_secs(1), outlet.come())
                .await
                .is_err(),
            "nothing is left"
        );
    }
}
