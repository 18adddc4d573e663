//! When the relay scans the table, and for which rows. No database, no broker.

use std::time::Duration;

use broker::Backoff;
use tokio::time::Instant;
use uuid::Uuid;

use crate::outbox::table::{POLLED_AFTER, Which};

/// Rows of one step: enough to hide the round trips, few enough that row locks are short.
pub(crate) const BATCH_MAX: u32 = 500;
const RETRY_DELAY_MIN: Duration = Duration::from_millis(100);
const RETRY_DELAY_MAX: Duration = Duration::from_secs(5);

/// What one step did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Step {
    /// Rows acknowledged and marked.
    pub(crate) published: usize,
    /// Rows that are left for another attempt.
    pub(crate) failed: usize,
    /// Some failed because no stream stores their subject.
    pub(crate) stream_missing: bool,
    /// The newest event of the step.
    pub(crate) newest: Option<Uuid>,
}

impl Step {
    /// Behind a full batch there are more.
    pub(crate) fn is_full(&self) -> bool {
        self.published == BATCH_MAX as usize
    }
}

/// The scans of one relay.
#[derive(Debug)]
pub(crate) struct Schedule {
    /// When rows that the broker did not take are tried again.
    retry_at: Instant,
    backoff: Backoff,
    /// When untried rows are scanned for, from which id on, and from which age.
    scan_at: Instant,
    from: Uuid,
    /// When this process started, until its first scan is done.
    started: Option<Instant>,
}

impl Schedule {
    /// Everything is due that was committed before this process started: it was handed off to
    /// nobody who is still there. (Rows of another replica may be among it; these are published
    /// twice under one id.)
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            retry_at: now,
            backoff: Backoff::new(RETRY_DELAY_MIN, RETRY_DELAY_MAX),
            scan_at: now,
            from: Uuid::nil(),
            started: Some(now),
        }
    }

    /// There is another connection to the broker: everything is due.
    pub(crate) fn start_over(&mut self, now: Instant) {
        (self.retry_at, self.scan_at) = (now, now);
        self.backoff.reset();
    }

    /// Which rows to take from the table now, if it is time for any.
    pub(crate) fn due(&self, now: Instant) -> Option<Which> {
        if now >= self.retry_at {
            Some(Which::Tried)
        } else if now >= self.scan_at {
            let age = self.started.map_or(POLLED_AFTER, |started| now - started);
            Some(Which::Untried(self.from, age.min(POLLED_AFTER)))
        } else {
            None
        }
    }

    pub(crate) fn next_at(&self) -> Instant {
        self.retry_at.min(self.scan_at)
    }

    /// Nothing is pending: no scan is needed for `pause`.
    pub(crate) fn nothing_pending(&mut self, pause: Duration, now: Instant) {
        self.backoff.reset();
        (self.retry_at, self.from, self.scan_at) = (now + pause, Uuid::nil(), now + pause);
        self.started = None;
    }

    /// All rows of a step were published. `pause` is the time to the next scan.
    pub(crate) fn done(&mut self, which: Which, step: Step, pause: Duration, now: Instant) {
        match (which, step.newest) {
            (Which::Recent, _) => {}
            (Which::Tried, _) => {
                self.backoff.reset();
                self.retry_at = if step.is_full() { now } else { now + pause };
            }
            // Published rows stay in the index of pending rows until a vacuum. Starting behind them
            // saves reading them again.
            (Which::Untried(..), Some(newest)) if step.is_full() => self.from = newest,
            (Which::Untried(..), _) => {
                (self.from, self.started) = (Uuid::nil(), None);
                self.scan_at = now + pause;
            }
        }
    }

    /// Some rows were not published. They are tried again after a pause, which grows.
    pub(crate) fn failed(&mut self, now: Instant) {
        self.retry_at = now + self.backoff.pause();
    }

    /// A scan ended with an error; it is tried again after a pause.
    pub(crate) fn interrupted(&mut self, now: Instant) {
        let pause = self.backoff.pause();
        self.retry_at = self.retry_at.max(now + pause);
        self.scan_at = self.scan_at.max(now + pause);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAUSE: Duration = Duration::from_secs(1);

    /// A schedule whose first scans found nothing.
    fn quiet(now: Instant) -> Schedule {
        let mut schedule = Schedule::new(now);
        assert_eq!(schedule.due(now), Some(Which::Tried));
        schedule.done(Which::Tried, Step::default(), PAUSE, now);
        let of_any_age = Which::Untried(Uuid::nil(), Duration::ZERO);
        assert_eq!(schedule.due(now), Some(of_any_age), "at first of any age");
        schedule.done(of_any_age, Step::default(), PAUSE, now);
        assert_eq!((schedule.due(now), schedule.next_at()), (None, now + PAUSE));
        schedule
    }

    #[test]
    fn untried_rows_are_taken_batch_by_batch_and_scanned_for_from_the_start_later() {
        let now = Instant::now();
        let mut schedule = quiet(now);
        let later = now + PAUSE;
        schedule.done(Which::Tried, Step::default(), PAUSE, later);
        let first = Which::Untried(Uuid::nil(), POLLED_AFTER);
        assert_eq!(schedule.due(later), Some(first));
        let newest = Uuid::now_v7();
        let step = |published, newest| Step {
            published,
            newest: Some(newest),
            ..Step::default()
        };
        schedule.done(first, step(BATCH_MAX as usize, newest), PAUSE, later);
        let second = Which::Untried(newest, POLLED_AFTER);
        assert_eq!(schedule.due(later), Some(second), "at once");
        schedule.done(second, step(3, Uuid::now_v7()), PAUSE, later);
        assert_eq!(schedule.due(later), None);
        schedule.done(Which::Tried, Step::default(), PAUSE, later + PAUSE);
        assert_eq!(schedule.due(later + PAUSE), Some(first));
    }

    #[test]
    fn rows_that_the_broker_does_not_take_wait_longer_each_time_and_delay_no_others() {
        let now = Instant::now();
        let mut schedule = quiet(now);
        for doublings in 0..8 {
            schedule.failed(now);
            let longest = (RETRY_DELAY_MIN * (1 << doublings)).min(RETRY_DELAY_MAX);
            let pause = schedule.retry_at - now;
            assert!((longest / 2..=longest).contains(&pause), "{pause:?}");
            assert_eq!(schedule.due(now), None);
            assert_eq!(schedule.due(now + pause), Some(Which::Tried));
        }
        assert!(schedule.next_at() <= now + PAUSE, "others are scanned for");
        schedule.start_over(now);
        assert_eq!(schedule.due(now), Some(Which::Tried), "at once");
        schedule.failed(now);
        assert!(schedule.retry_at - now <= RETRY_DELAY_MIN);
    }
}
