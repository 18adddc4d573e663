//! How often a whole table is scanned for what is pending.
//!
//! An index keeps old row versions until a vacuum removes them, and a vacuum keeps what an old
//! snapshot may still see. So a scan of what is pending mostly takes a millisecond, but seconds
//! while someone holds a snapshot: a backup, an audit, a forgotten session. Scans then become rare,
//! and in between only recent rows are looked at, whose number does not depend on the table.

use std::time::Duration;

/// A scan that takes longer is slow.
const QUICK: Duration = Duration::from_millis(10);
const PAUSE_MIN: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(60);
const TIMEOUT_MIN: Duration = Duration::from_secs(20);
const TIMEOUT_MAX: Duration = Duration::from_secs(600);
/// Between slow scans, rows with an id of this age are looked at.
pub(crate) const RECENT: Duration = Duration::from_secs(15);

/// The pace of one scan.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Pace {
    /// How long the last scan took.
    took: Duration,
}

impl Pace {
    pub(crate) fn note(&mut self, took: Duration) {
        self.took = took;
    }

    pub(crate) fn is_slow(self) -> bool {
        self.took > QUICK
    }

    /// Time until the next scan: scans take at most a hundredth of the time, but run once a minute.
    pub(crate) fn pause(self) -> Duration {
        (self.took * 100).clamp(PAUSE_MIN, PAUSE_MAX)
    }

    /// A scan that takes longer is given up: its connection may be dead.
    pub(crate) fn timeout(self) -> Duration {
        (self.took * 10).clamp(TIMEOUT_MIN, TIMEOUT_MAX)
    }
}

/// SQL for the smallest id that can be minted at a time, which is SQL too. Only PostgreSQL's clock
/// decides which ids are recent. An id minted by a clock that is wrong is found by a scan.
pub(crate) fn id_at(time: &str) -> String {
    format!(
        "(lpad(to_hex((extract(epoch FROM {time}) * 1000)::bigint), 12, '0')
          || repeat('0', 20))::uuid"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quick_scan_runs_every_second_and_a_slow_one_every_minute() {
        let mut pace = Pace::default();
        assert_eq!((pace.pause(), pace.is_slow()), (PAUSE_MIN, false));
        pace.note(Duration::from_millis(50));
        assert_eq!(
            (pace.pause(), pace.is_slow()),
            (Duration::from_secs(5), true)
        );
        pace.note(Duration::from_secs(7));
        assert_eq!(
            (pace.pause(), pace.timeout()),
            (PAUSE_MAX, Duration::from_secs(70))
        );
    }
}
