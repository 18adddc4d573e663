//! Acknowledged rows that are not marked as published yet. They are marked together, because each
//! statement costs a round trip and a write to the disk.
//!
//! If the process dies before, a relay finds the rows and publishes them again under the same
//! message ids.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::outbox::table::Acknowledged;

/// How long the first row waits for others: most orders end within this time.
const WAIT: Duration = Duration::from_millis(10);
/// Minimum time between two statements. Well below the age at which the table is polled.
const INTERVAL: Duration = Duration::from_millis(100);
/// So many rows are marked at once.
const ROWS_MAX: usize = 500;
/// If the database does not answer, more rows are left to polling.
const WAITING_MAX: usize = 5000;

#[derive(Debug, Default)]
pub(crate) struct Marks {
    rows: Mutex<Vec<Acknowledged>>,
    added: Notify,
    full: Notify,
}

impl Marks {
    pub(crate) fn add(&self, acknowledged: Vec<Acknowledged>) {
        if acknowledged.is_empty() {
            return;
        }
        let mut rows = self.rows();
        if rows.len() + acknowledged.len() <= WAITING_MAX {
            rows.extend(acknowledged);
        }
        let is_full = rows.len() >= ROWS_MAX;
        drop(rows);
        self.added.notify_one();
        if is_full {
            self.full.notify_one();
        }
    }

    pub(crate) fn take(&self) -> Vec<Acknowledged> {
        std::mem::take(&mut *self.rows())
    }

    /// Returns once rows should be marked. `last` is when rows were marked last.
    pub(crate) async fn due(&self, last: Instant) {
        self.added.notified().await;
        let at = (last + INTERVAL).max(Instant::now() + WAIT);
        let _ = tokio::time::timeout_at(at, self.full.notified()).await;
    }

    fn rows(&self) -> MutexGuard<'_, Vec<Acknowledged>> {
        // Each change is one operation, so a panic leaves the list consistent.
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
