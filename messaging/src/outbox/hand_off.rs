//! Hands committed rows off to the relay of the same process in memory, so that it need not poll
//! the outbox for them. Correctness does not depend on it. Rows that were not handed off (the
//! process died, the outcome of the commit is unknown, the queue was full) are found by polling the
//! table.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::outbox::table::Pending;

/// Maximum number of queued rows: a few megabytes, and about one second of work for a busy relay.
const ROWS_MAX: usize = 5000;
/// Rows that are queued for longer are left to polling. This is well below
/// [`POLLED_AFTER`](crate::outbox::table::POLLED_AFTER); otherwise both would publish a row. The
/// broker would drop the duplicate, but it adds load when load is already too high.
const WAIT_MAX: Duration = Duration::from_millis(700);

/// Minimum time between two publications of rows that are not urgent. After a longer pause, they
/// are published at once, while the broker is still active.
const INTERVAL: Duration = Duration::from_millis(25);

/// After so many rows at once, the next ones gather: the broker stores a batch with one fsync.
const BUSY_ROWS: usize = 8;
/// Time between two batches under load.
const BUSY_INTERVAL: Duration = Duration::from_millis(10);
/// So many rows do not wait for others.
const BATCH_ROWS: usize = 200;

/// The queue between transactions and relay. Clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct HandOff(Arc<Queue>);

#[derive(Debug)]
struct Queue {
    rows: Mutex<Rows>,
    rows_max: usize,
    arrived: Notify,
}

#[derive(Debug, Default)]
struct Rows {
    /// Each with the time of its hand-off.
    waiting: VecDeque<(Instant, Pending)>,
    /// The next rows are taken not before this time,
    next_at: Option<Instant>,
    /// and those that are not urgent not before this one.
    next_later_at: Option<Instant>,
}

impl Default for Queue {
    fn default() -> Self {
        Self {
            rows: Mutex::default(),
            rows_max: ROWS_MAX,
            arrived: Notify::new(),
        }
    }
}

impl HandOff {
    /// A queue that drops all rows, for a process without a relay.
    pub(crate) fn nowhere() -> Self {
        Self(Arc::new(Queue {
            rows_max: 0,
            ..Queue::default()
        }))
    }

    /// Call it only after the commit: a published message cannot be withdrawn.
    pub(crate) fn hand_off(&self, enqueued: Vec<Pending>) {
        if enqueued.is_empty() {
            return;
        }
        let now = Instant::now();
        let mut rows = self.rows();
        if rows.waiting.len() + enqueued.len() <= self.0.rows_max {
            let enqueued = enqueued.into_iter();
            rows.waiting.extend(enqueued.map(|row| (now, row)));
        }
        drop(rows);
        self.0.arrived.notify_one();
    }

    /// Up to `limit` rows that should be published now, in the order in which they were handed off,
    /// but urgent ones first.
    pub(crate) fn take(&self, limit: usize) -> Vec<Pending> {
        let now = Instant::now();
        let mut rows = self.rows();
        while let Some((since, _)) = rows.waiting.front()
            && now - *since > WAIT_MAX
        {
            rows.waiting.pop_front();
        }
        if rows.due_at().is_none_or(|at| at > now) {
            return Vec::new();
        }
        let taken = rows.waiting.len().min(limit);
        let taken = rows.waiting.drain(..taken).map(|(_, row)| row);
        let mut taken: Vec<Pending> = taken.collect();
        taken.sort_by_key(|row| !row.is_urgent);
        if taken.len() >= BUSY_ROWS {
            rows.next_at = Some(now + BUSY_INTERVAL);
        }
        if taken.last().is_some_and(|row| !row.is_urgent) {
            rows.next_later_at = Some(now + INTERVAL);
        }
        if !rows.waiting.is_empty() {
            // Wakes the other lane of the relay.
            self.0.arrived.notify_one();
        }
        taken
    }

    /// Returns once rows should be published.
    pub(crate) async fn arrived(&self) {
        loop {
            let arrived = self.0.arrived.notified();
            let due_at = self.rows().due_at();
            match due_at {
                None => arrived.await,
                Some(at) if at <= Instant::now() => return,
                Some(at) => {
                    let _ = tokio::time::timeout_at(at, arrived).await;
                }
            }
        }
    }

    fn rows(&self) -> MutexGuard<'_, Rows> {
        // Each change of the queue is one operation, so a panic leaves it consistent.
        self.0.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Rows {
    /// When rows should be published. A row after a pause is published at once. Under load, rows
    /// gather, and so do those that are not urgent, if some were published just before.
    fn due_at(&self) -> Option<Instant> {
        let (oldest, _) = self.waiting.front()?;
        if self.waiting.len() >= BATCH_ROWS {
            return Some(*oldest);
        }
        let is_urgent = self.waiting.iter().any(|(_, row)| row.is_urgent);
        let later_at = self.next_later_at.filter(|_| !is_urgent);
        Some((*oldest).max(self.next_at.max(later_at).unwrap_or(*oldest)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outbox::publish::tests::pending;

    fn rows(number: usize) -> Vec<Pending> {
        vec![pending(0); number]
    }

    #[tokio::test(start_paused = true)]
    async fn rows_that_are_too_many_or_too_old_are_left_to_polling() {
        let hand_off = HandOff::default();
        hand_off.hand_off(rows(ROWS_MAX - 1));
        hand_off.hand_off(rows(2));
        assert_eq!(hand_off.take(10).len(), 10);
        assert_eq!(
            hand_off.take(ROWS_MAX).len(),
            ROWS_MAX - 11,
            "two did not fit"
        );

        hand_off.hand_off(rows(3));
        tokio::time::advance(WAIT_MAX + Duration::from_millis(1)).await;
        hand_off.hand_off(rows(1));
        assert_eq!(hand_off.take(10).len(), 1, "three were queued for too long");
    }

    #[tokio::test(start_paused = true)]
    async fn taking_a_part_wakes_the_other_lane_for_the_rest() {
        let hand_off = HandOff::default();
        hand_off.hand_off(rows(3));
        hand_off.arrived().await;
        assert_eq!(hand_off.take(2).len(), 2);
        hand_off.arrived().await;
        assert_eq!(hand_off.take(2).len(), 1);
        let more = tokio::time::timeout(Duration::from_secs(1), hand_off.arrived()).await;
        assert!(more.is_err(), "nothing is left");
    }

    #[tokio::test(start_paused = true)]
    async fn rows_that_are_not_urgent_wait_for_others_but_not_long() {
        let later = || {
            let row = pending(0);
            vec![Pending {
                is_urgent: false,
                ..row
            }]
        };
        let hand_off = HandOff::default();
        let begun = Instant::now();
        hand_off.hand_off(later());
        hand_off.arrived().await;
        assert_eq!(begun.elapsed(), Duration::ZERO, "after a pause");
        assert_eq!(hand_off.take(10).len(), 1);
        hand_off.hand_off(later());
        hand_off.arrived().await;
        assert_eq!(begun.elapsed(), INTERVAL);
        assert_eq!(hand_off.take(10).len(), 1);

        let begun = Instant::now();
        hand_off.hand_off(later());
        hand_off.hand_off(rows(1));
        hand_off.arrived().await;
        assert_eq!(begun.elapsed(), Duration::ZERO);
        let taken = hand_off.take(10);
        let urgent: Vec<bool> = taken.iter().map(|row| row.is_urgent).collect();
        assert_eq!(urgent, [true, false], "together");
    }

    #[tokio::test(start_paused = true)]
    async fn rows_gather_after_a_batch_but_a_full_batch_does_not_wait() {
        let hand_off = HandOff::default();
        let begun = Instant::now();
        hand_off.hand_off(rows(BUSY_ROWS));
        assert_eq!(hand_off.take(BATCH_ROWS).len(), BUSY_ROWS);
        hand_off.hand_off(rows(1));
        assert_eq!(hand_off.take(BATCH_ROWS).len(), 0, "it waits for others");
        hand_off.hand_off(rows(1));
        hand_off.arrived().await;
        assert_eq!(begun.elapsed(), BUSY_INTERVAL);
        assert_eq!(hand_off.take(BATCH_ROWS).len(), 2);

        hand_off.hand_off(rows(BUSY_ROWS));
        hand_off.arrived().await;
        assert_eq!(hand_off.take(BATCH_ROWS).len(), BUSY_ROWS);
        hand_off.hand_off(rows(BATCH_ROWS));
        assert_eq!(hand_off.take(BATCH_ROWS).len(), BATCH_ROWS);
    }
}
