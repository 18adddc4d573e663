//! Requests that wait for an order to become final (`?wait=`).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use messaging::Database;
use time::OffsetDateTime;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::debug;
use uuid::Uuid;

use crate::entity::order::{self, Status};

/// Interval of polling for orders that another replica made final. Orders that this process makes
/// final wake their requests at once.
const POLL_INTERVAL: Duration = Duration::from_millis(200);
/// A poll that takes longer is abandoned.
const POLL_TIMEOUT: Duration = Duration::from_secs(5);

/// The waiting requests by order id. Clones share one map.
#[derive(Clone, Debug, Default)]
pub(crate) struct Waiting(Arc<Mutex<HashMap<Uuid, Vec<Arc<Slot>>>>>);

/// A waiting request. Dropping it ends the wait.
#[derive(Debug)]
pub(crate) struct Waiter {
    waiting: Waiting,
    id: Uuid,
    slot: Arc<Slot>,
}

#[derive(Debug, Default)]
struct Slot {
    notify: Notify,
    /// How the order ended, if this process made it final.
    end: OnceLock<End>,
}

/// How an order ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct End {
    pub(crate) status: Status,
    pub(crate) reason: Option<&'static str>,
    pub(crate) at: OffsetDateTime,
}

impl Waiting {
    /// Registers a request. To miss no change, call this first, then read the order, then wait with
    /// [`Waiter::woken`].
    pub(crate) fn register(&self, id: Uuid) -> Waiter {
        let slot = Arc::new(Slot::default());
        self.lock().entry(id).or_default().push(slot.clone());
        Waiter {
            waiting: self.clone(),
            id,
            slot,
        }
    }

    /// Wakes the requests that wait for these orders. The orders must be final.
    pub(crate) fn wake(&self, ended: impl IntoIterator<Item = (Uuid, Option<End>)>) {
        let waiting = self.lock();
        if waiting.is_empty() {
            return;
        }
        for (id, end) in ended {
            for slot in waiting.get(&id).into_iter().flatten() {
                if let Some(end) = end {
                    slot.end.get_or_init(|| end);
                }
                slot.notify.notify_one();
            }
        }
    }

    /// Polls for orders that another replica made final, with one query for all requests. Sends no
    /// query while no request waits.
    pub(crate) async fn run(
        &self,
        db: &Database,
        shutdown: CancellationToken,
    ) -> anyhow::Result<()> {
        while shutdown
            .run_until_cancelled(tokio::time::sleep(POLL_INTERVAL))
            .await
            .is_some()
        {
            let ids: Vec<Uuid> = self.lock().keys().copied().collect();
            if ids.is_empty() {
                continue;
            }
            let polled = tokio::time::timeout(POLL_TIMEOUT, order::final_among(db, ids)).await;
            match polled {
                Ok(Ok(ids)) => self.wake(ids.into_iter().map(|id| (id, None))),
                // Nothing is lost: each request reads its order itself when its time is up.
                Ok(Err(error)) => debug!(error = %error, "Polling for final orders failed"),
                Err(elapsed) => debug!(error = %elapsed, "Polling for final orders failed"),
            }
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Uuid, Vec<Arc<Slot>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiter {
    /// Returns when the order is final. `None` if it must be read, because another replica made it
    /// final.
    pub(crate) async fn woken(&self) -> Option<End> {
        self.slot.notify.notified().await;
        self.slot.end.get().copied()
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        let mut waiting = self.waiting.lock();
        if let Some(waiters) = waiting.get_mut(&self.id) {
            waiters.retain(|other| !Arc::ptr_eq(other, &self.slot));
            if waiters.is_empty() {
                waiting.remove(&self.id);
            }
        }
    }
}
