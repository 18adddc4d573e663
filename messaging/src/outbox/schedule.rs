//! When a lane of the relay polls the table, and for which rows. No database, no broker.

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

/// The polls of one lane.
#[derive(Debug)]
pub(crate) struct Schedule {
    poll_interval: Duration,
    /// When rows that the broker did not take are tried again.
    retry_at: Instant,
    backoff: Backoff,
    /// When untried rows are polled for, from which id on, and from which age.
    poll_at: Instant,
    from: Uuid,
    age: Duration,
}

impl Schedule {
    /// Everything is due, however young: what was committed before this process started was handed
    /// off to nobody who is still there. (Rows of another replica may be among it; these are
    /// published twice under one id.)
    pub(crate) fn new(poll_interval: Duration, now: Instant) -> Self {
        Self {
            poll_interval,
            retry_at: now,
            backoff: Backoff::new(RETRY_DELAY_MIN, RETRY_DELAY_MAX),
            poll_at: now,
            from: Uuid::nil(),
            age: Duration::ZERO,
        }
    }

    /// There is another connection to the broker: everything is due.
    pub(crate) fn start_over(&mut self, now: Instant) {
        (self.retry_at, self.poll_at) = (now, now);
        self.backoff.reset();
    }

    /// Which rows to take from the table now, if it is time for any.
    pub(crate) fn due(&self, now: Instant) -> Option<Which> {
        if now >= self.retry_at {
            Some(Which::Tried)
        } else if now >= self.poll_at {
            Some(Which::Untried(self.from, self.age))
        } else {
            None
        }
    }

    pub(crate) fn next_at(&self) -> Instant {
        self.retry_at.min(self.poll_at)
    }

    /// The outbox is empty: no poll is needed until then.
    pub(crate) fn nothing_waits(&mut self, until: Instant) {
        self.backoff.reset();
        (self.retry_at, self.from, self.poll_at) = (until, Uuid::nil(), until);
    }

    /// All rows of a step were published. Behind a full batch there are more.
    pub(crate) fn done(&mut self, which: Option<Which>, step: Step, now: Instant) {
        let full = step.published == BATCH_MAX as usize;
        match (which, step.newest) {
            (None, _) => {}
            (Some(Which::Tried), _) => {
                self.backoff.reset();
                self.retry_at = if full { now } else { now + self.poll_interval };
            }
            // Published rows stay in the index of waiting rows until a vacuum. Starting behind them
            // saves walking through them again.
            (Some(Which::Untried(..)), Some(newest)) if full => self.from = newest,
            (Some(Which::Untried(..)), _) => {
                (self.from, self.age) = (Uuid::nil(), POLLED_AFTER);
                self.poll_at = now + self.poll_interval;
            }
        }
    }

    /// Some rows were not published. Returns the pause after which they are tried again.
    pub(crate) fn failed(&mut self, now: Instant) -> Duration {
        let pause = self.backoff.pause();
        self.retry_at = now + pause;
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLL: Duration = Duration::from_secs(1);

    /// A schedule whose first polls found nothing.
    fn quiet(now: Instant) -> Schedule {
        let mut schedule = Schedule::new(POLL, now);
        assert_eq!(schedule.due(now), Some(Which::Tried));
        schedule.done(Some(Which::Tried), Step::default(), now);
        let of_any_age = Some(Which::Untried(Uuid::nil(), Duration::ZERO));
        assert_eq!(schedule.due(now), of_any_age, "at first of any age");
        schedule.done(schedule.due(now), Step::default(), now);
        assert_eq!((schedule.due(now), schedule.next_at()), (None, now + POLL));
        schedule
    }

    #[test]
    fn untried_rows_are_taken_batch_by_batch_and_polled_for_from_the_start_later() {
        let now = Instant::now();
        let mut schedule = quiet(now);
        let later = now + POLL;
        schedule.done(Some(Which::Tried), Step::default(), later);
        let first = schedule.due(later);
        assert_eq!(first, Some(Which::Untried(Uuid::nil(), POLLED_AFTER)));
        let newest = Uuid::now_v7();
        let step = |published, newest| Step {
            published,
            newest: Some(newest),
            ..Step::default()
        };
        schedule.done(first, step(BATCH_MAX as usize, newest), later);
        let second = schedule.due(later);
        let behind_the_first = Some(Which::Untried(newest, POLLED_AFTER));
        assert_eq!(second, behind_the_first, "at once");
        schedule.done(second, step(3, Uuid::now_v7()), later);
        assert_eq!(schedule.due(later), None);
        schedule.done(Some(Which::Tried), Step::default(), later + POLL);
        let from_the_start = Some(Which::Untried(Uuid::nil(), POLLED_AFTER));
        assert_eq!(schedule.due(later + POLL), from_the_start);
    }

    #[test]
    fn rows_that_the_broker_does_not_take_wait_longer_each_time_and_delay_no_others() {
        let now = Instant::now();
        let mut schedule = quiet(now);
        for doublings in 0..8 {
            let pause = schedule.failed(now);
            let longest = (RETRY_DELAY_MIN * (1 << doublings)).min(RETRY_DELAY_MAX);
            assert!((longest / 2..=longest).contains(&pause), "{pause:?}");
            assert_eq!(schedule.due(now), None);
            assert_eq!(schedule.due(now + pause), Some(Which::Tried));
        }
        assert!(schedule.next_at() <= now + POLL, "others are polled for");
        schedule.start_over(now);
        assert_eq!(schedule.due(now), Some(Which::Tried), "at once");
        assert!(schedule.failed(now) <= RETRY_DELAY_MIN);
    }
}
