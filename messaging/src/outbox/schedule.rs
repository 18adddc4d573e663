//! Decides when the relay scans the table and for which rows. Uses neither database nor broker.

use std::time::Duration;

use broker::Backoff;
use tokio::time::Instant;
use uuid::Uuid;

use crate::outbox::table::{POLLED_AFTER, Which};

/// Maximum number of rows per step: large enough to amortize round trips, small enough to keep row
/// locks short.
pub(crate) const BATCH_MAX: u32 = 500;
const RETRY_DELAY_MIN: Duration = Duration::from_millis(100);
const RETRY_DELAY_MAX: Duration = Duration::from_secs(5);

/// Result of one step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Step {
    /// Rows that were acknowledged and marked.
    pub(crate) published: usize,
    /// Rows that need another attempt.
    pub(crate) failed: usize,
    /// Whether a row failed because no stream stores its subject.
    pub(crate) stream_missing: bool,
    /// Id of the newest event of the step.
    pub(crate) newest: Option<Uuid>,
}

impl Step {
    /// After a full batch there may be more rows.
    pub(crate) fn is_full(&self) -> bool {
        self.published == BATCH_MAX as usize
    }
}

/// The scan schedule of one relay.
#[derive(Debug)]
pub(crate) struct Schedule {
    /// When rows that the broker did not accept are retried.
    retry_at: Instant,
    backoff: Backoff,
    /// When the next scan for untried rows is due, from which id, and from which age.
    scan_at: Instant,
    from: Uuid,
    /// Start time of this process; `None` after its first scan.
    started: Option<Instant>,
}

impl Schedule {
    /// All rows that were committed before this process started are due: the process that they were
    /// handed off to may be dead. (Rows of another replica may be among them; these are published
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

    /// After a reconnect to the broker, all rows are due.
    pub(crate) fn start_over(&mut self, now: Instant) {
        (self.retry_at, self.scan_at) = (now, now);
        self.backoff.reset();
    }

    /// The rows to read from the table now, if a scan is due.
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

    /// Nothing is pending: the next scan is due after `pause`.
    pub(crate) fn nothing_pending(&mut self, pause: Duration, now: Instant) {
        self.backoff.reset();
        (self.retry_at, self.from, self.scan_at) = (now + pause, Uuid::nil(), now + pause);
        self.started = None;
    }

    /// All rows of a step were published. `pause` is the time until the next scan.
    pub(crate) fn done(&mut self, which: Which, step: Step, pause: Duration, now: Instant) {
        match (which, step.newest) {
            (Which::Recent, _) => {}
            (Which::Tried, _) => {
                self.backoff.reset();
                self.retry_at = if step.is_full() { now } else { now + pause };
            }
            // Published rows stay in the index of pending rows until a vacuum. The next step starts
            // after them to skip them.
            (Which::Untried(..), Some(newest)) if step.is_full() => self.from = newest,
            (Which::Untried(..), _) => {
                (self.from, self.started) = (Uuid::nil(), None);
                self.scan_at = now + pause;
            }
        }
    }

    /// Some rows were not published. They are retried after a growing pause.
    pub(crate) fn failed(&mut self, now: Instant) {
        self.retry_at = now + self.backoff.pause();
    }

    /// A scan failed; it is retried after a pause.
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
        assert_eq!(
            schedule.due(now),
            Some(of_any_age),
            "the first scan has no age limit"
        );
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
        assert_eq!(schedule.due(later), Some(second), "without a pause");
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
        assert!(
            schedule.next_at() <= now + PAUSE,
            "scans for other rows continue"
        );
        schedule.start_over(now);
        assert_eq!(schedule.due(now), Some(Which::Tried), "without a pause");
        schedule.failed(now);
        assert!(schedule.retry_at - now <= RETRY_DELAY_MIN);
    }
}
