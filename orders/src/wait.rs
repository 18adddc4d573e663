//! Requests that wait for an order to become final (`?wait=`).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use messaging::Database;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::debug;
use uuid::Uuid;

use crate::entity::order;

/// Orders that another replica ended are noticed after this long; those of this process at once.
const POLL_INTERVAL: Duration = Duration::from_millis(200);
/// A poll that hangs is given up.
const POLL_TIMEOUT: Duration = Duration::from_secs(5);

/// The requests that wait, by order. Clones share them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Waiting(Arc<Mutex<HashMap<Uuid, Vec<Arc<Notify>>>>>);

/// One request that waits, until it is dropped.
#[derive(Debug)]
pub(crate) struct Waiter {
    waiting: Waiting,
    id: Uuid,
    notify: Arc<Notify>,
}

impl Waiting {
    /// Begins to wait. Read the order after this and before [`Waiter::woken`]: then no change is
    /// missed.
    pub(crate) fn register(&self, id: Uuid) -> Waiter {
        let notify = Arc::new(Notify::new());
        self.lock().entry(id).or_default().push(notify.clone());
        Waiter {
            waiting: self.clone(),
            id,
            notify,
        }
    }

    /// Wakes the requests that wait for these orders, which became final.
    pub(crate) fn wake(&self, ids: &[Uuid]) {
        let waiting = self.lock();
        if waiting.is_empty() {
            return;
        }
        for notify in ids.iter().filter_map(|id| waiting.get(id)).flatten() {
            notify.notify_one();
        }
    }

    /// Polls, in one query for all requests, for orders that another replica ended. Does nothing
    /// while nobody waits.
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
                Ok(Ok(ids)) => self.wake(&ids),
                // Each request reads the order itself when its time is up.
                Ok(Err(error)) => debug!(error = %error, "Orders could not be polled"),
                Err(elapsed) => debug!(error = %elapsed, "Orders could not be polled"),
            }
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Uuid, Vec<Arc<Notify>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiter {
    /// Returns when the order is final.
    pub(crate) async fn woken(&self) {
        self.notify.notified().await;
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        let mut waiting = self.waiting.lock();
        if let Some(waiters) = waiting.get_mut(&self.id) {
            waiters.retain(|other| !Arc::ptr_eq(other, &self.notify));
            if waiters.is_empty() {
                waiting.remove(&self.id);
            }
        }
    }
}
