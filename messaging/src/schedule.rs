//! When a relay looks for what: what the broker would not take, and what nobody was handed. No database, no broker.

use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

use crate::broker::jitter;
use crate::outbox::{LOOKED_FOR_AFTER, Which};

/// Rows in one go: enough to hide the round trips, few enough that the row locks are short.
pub(crate) const BATCH_MAX: u32 = 500;
const RETRY_DELAY_MIN: Duration = Duration::from_millis(100);
const RETRY_DELAY_MAX: Duration = Duration::from_secs(5);

/// What one step did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Step {
    /// Rows acknowledged and marked.
    pub(crate) published: usize,
    /// Rows that stay for another try.
    pub(crate) failed: usize,
    /// Whether some failed because nobody stores their subject: the stream is gone.
    pub(crate) stream_missing: bool,
    /// The newest fact among all these.
    pub(crate) newest: Option<Uuid>,
}

/// The looks of one lane.
#[derive(Debug)]
pub(crate) struct Schedule {
    poll_interval: Duration,
    /// When rows that the broker would not take are tried again.
    retry_at: Instant,
    retry_delay: Duration,
    /// When rows that nobody was handed are looked for,
    look_at: Instant,
    /// from which id on,
    from: Uuid,
    /// and from which age.
    age: Duration,
}

impl Schedule {
    /// Everything is due, however young it is: what was committed before we were here was handed to nobody who is still there.
    /// (Another replica's may be among it: then it is published twice under one id.)
    pub(crate) fn new(poll_interval: Duration, now: Instant) -> Self {
        let (retry_delay, from, age) = (RETRY_DELAY_MIN, Uuid::nil(), Duration::ZERO);
        Self {
            poll_interval,
            retry_at: now,
            retry_delay,
            look_at: now,
            from,
            age,
        }
    }

    /// There is another connection to the broker: everything is due.
    pub(crate) fn begin_anew(&mut self, now: Instant) {
        (self.retry_at, self.look_at, self.retry_delay) = (now, now, RETRY_DELAY_MIN);
    }

    /// What to look for now, if it is time. A row that the broker would not take waits for its turn.
    pub(crate) fn due(&self, now: Instant) -> Option<Which> {
        if now >= self.retry_at {
            Some(Which::Tried)
        } else if now >= self.look_at {
            Some(Which::Left(self.from, self.age))
        } else {
            None
        }
    }

    /// When something is due.
    pub(crate) fn next_at(&self) -> Instant {
        self.retry_at.min(self.look_at)
    }

    /// The outbox is empty: until then nobody needs to look.
    pub(crate) fn nothing_waits(&mut self, until: Instant) {
        self.retry_delay = RETRY_DELAY_MIN;
        (self.retry_at, self.from, self.look_at) = (until, Uuid::nil(), until);
    }

    /// All rows of a step went through. Behind a full batch there is more.
    pub(crate) fn done(&mut self, which: Option<Which>, step: Step, now: Instant) {
        let full = step.published == BATCH_MAX as usize;
        match (which, step.newest) {
            (None, _) => {}
            (Some(Which::Tried), _) => {
                self.retry_delay = RETRY_DELAY_MIN;
                self.retry_at = if full { now } else { now + self.poll_interval };
            }
            // Walking through what was just published takes the longer the more there is: the index of waiting rows keeps an
            // entry for each until a vacuum.
            (Some(Which::Left(..)), Some(newest)) if full => self.from = newest,
            (Some(Which::Left(..)), _) => {
                (self.from, self.age, self.look_at) =
                    (Uuid::nil(), LOOKED_FOR_AFTER, now + self.poll_interval);
            }
        }
    }

    /// Some did not. They are tried again after the pause that this says, longer each time.
    pub(crate) fn failed(&mut self, now: Instant) -> Duration {
        let pause = self.retry_delay.mul_f64(jitter());
        self.retry_at = now + pause;
        self.retry_delay = (self.retry_delay * 2).min(RETRY_DELAY_MAX);
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLL: Duration = Duration::from_secs(1);

    /// A schedule whose first look found nothing.
    fn quiet(now: Instant) -> Schedule {
        let mut schedule = Schedule::new(POLL, now);
        assert_eq!(schedule.due(now), Some(Which::Tried));
        schedule.done(Some(Which::Tried), Step::default(), now);
        assert_eq!(
            schedule.due(now),
            Some(Which::Left(Uuid::nil(), Duration::ZERO)),
            "at first of any age"
        );
        schedule.done(schedule.due(now), Step::default(), now);
        assert_eq!((schedule.due(now), schedule.next_at()), (None, now + POLL));
        schedule
    }

    #[test]
    fn what_was_left_is_walked_through_batch_by_batch_and_looked_for_from_its_beginning_later() {
        let now = Instant::now();
        let mut schedule = quiet(now);
        let later = now + POLL;
        schedule.done(Some(Which::Tried), Step::default(), later);
        let first = schedule.due(later);
        assert_eq!(first, Some(Which::Left(Uuid::nil(), LOOKED_FOR_AFTER)));
        let newest = Uuid::now_v7();
        schedule.done(
            first,
            Step {
                published: BATCH_MAX as usize,
                newest: Some(newest),
                ..Step::default()
            },
            later,
        );
        let second = schedule.due(later);
        assert_eq!(
            second,
            Some(Which::Left(newest, LOOKED_FOR_AFTER)),
            "at once, behind the first batch"
        );
        schedule.done(
            second,
            Step {
                published: 3,
                newest: Some(Uuid::now_v7()),
                ..Step::default()
            },
            later,
        );
        assert_eq!(schedule.due(later), None);
        schedule.done(Some(Which::Tried), Step::default(), later + POLL);
        assert_eq!(
            schedule.due(later + POLL),
            Some(Which::Left(Uuid::nil(), LOOKED_FOR_AFTER))
        );
    }

    #[test]
    fn what_the_broker_does_not_take_waits_longer_each_time_and_keeps_nothing_else_waiting() {
        let now = Instant::now();
        let mut schedule = quiet(now);
        let mut before = Duration::ZERO;
        for doublings in 0..8 {
            let pause = schedule.failed(now);
            let longest = (RETRY_DELAY_MIN * (1 << doublings)).min(RETRY_DELAY_MAX);
            assert!(
                pause >= longest / 2 && pause <= longest && pause * 2 >= before,
                "{pause:?} after {before:?}"
            );
            assert_eq!(schedule.due(now), None);
            assert_eq!(schedule.due(now + pause), Some(Which::Tried));
            before = pause;
        }
        assert!(
            schedule.next_at() <= now + POLL,
            "others are looked for meanwhile"
        );
        schedule.begin_anew(now);
        assert_eq!(
            schedule.due(now),
            Some(Which::Tried),
            "another connection: at once"
        );
        assert!(schedule.failed(now) <= RETRY_DELAY_MIN);
    }
}
