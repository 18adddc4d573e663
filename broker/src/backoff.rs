//! Pauses between retries: exponential, capped, with jitter.

use std::time::Duration;

/// Doubles the pause with each failure, up to a cap.
#[derive(Clone, Debug)]
pub struct Backoff {
    min: Duration,
    max: Duration,
    next: Duration,
}

impl Backoff {
    pub const fn new(min: Duration, max: Duration) -> Self {
        Self {
            min,
            max,
            next: min,
        }
    }

    /// Returns the pause before the next attempt. Call it after a failure.
    pub fn pause(&mut self) -> Duration {
        let pause = self.next.mul_f64(jitter());
        self.next = (self.next * 2).min(self.max);
        pause
    }

    /// Starts again with the shortest pause. Call it after a success.
    pub fn reset(&mut self) {
        self.next = self.min;
    }
}

/// A random factor from 0.5 to 1: processes that failed at the same time retry at different times.
pub fn jitter() -> f64 {
    // The last 16 bits of a UUIDv4 are random.
    let random = uuid::Uuid::new_v4().as_u128() as u16;
    0.5 + 0.5 * f64::from(random) / f64::from(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_cap_and_differ_between_processes() {
        const MIN: Duration = Duration::from_millis(100);
        const MAX: Duration = Duration::from_secs(5);
        let mut backoff = Backoff::new(MIN, MAX);
        for doublings in 0..8 {
            let longest = (MIN * (1 << doublings)).min(MAX);
            let pause = backoff.pause();
            assert!((longest / 2..=longest).contains(&pause), "{pause:?}");
        }
        backoff.reset();
        assert!(backoff.pause() <= MIN);
        let first = Backoff::new(MIN, MAX).pause();
        assert!((0..100).any(|_| Backoff::new(MIN, MAX).pause() != first));
    }
}
