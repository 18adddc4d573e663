//! Requests that wait for an order to become final (`?wait=`).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use messaging::db;
use sea_orm::DatabaseConnection;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::debug;
use uuid::Uuid;

use crate::entity::order;

/// Orders that another replica of this service ended are noticed after this long; our own at once.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// A look that hangs is given up.
const LOOK_TIMEOUT: Duration = Duration::from_secs(5);

/// Who waits for which order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Waiting(Arc<Mutex<HashMap<Uuid, Vec<Arc<Notify>>>>>);

/// A place in the queue; dropped, it is given up.
#[derive(Debug)]
pub(crate) struct Waiter {
    waiting: Waiting,
    id: Uuid,
    notify: Arc<Notify>,
}

impl Waiting {
    /// Begins to wait. Look at the order after this and before [`Waiter::woken`]: then no change is missed.
    pub(crate) fn register(&self, id: Uuid) -> Waiter {
        let notify = Arc::new(Notify::new());
        self.lock().entry(id).or_default().push(notify.clone());
        Waiter {
            waiting: self.clone(),
            id,
            notify,
        }
    }

    /// These orders became final.
    pub(crate) fn wake(&self, ids: &[Uuid]) {
        let waiting = self.lock();
        if waiting.is_empty() {
            return;
        }
        for notify in ids.iter().filter_map(|id| waiting.get(id)).flatten() {
            notify.notify_one();
        }
    }

    /// Looks, in one query for all waiters, for orders that others ended. Does nothing while nobody waits.
    pub(crate) async fn run(
        &self,
        db: &DatabaseConnection,
        shutdown: CancellationToken,
    ) -> anyhow::Result<()> {
        while shutdown
            .run_until_cancelled(tokio::time::sleep(LOOK_INTERVAL))
            .await
            .is_some()
        {
            let ids: Vec<Uuid> = self.lock().keys().copied().collect();
            if ids.is_empty() {
                continue;
            }
            match db::within(LOOK_TIMEOUT, order::final_among(db, ids)).await {
                Ok(ids) => self.wake(&ids),
                // Whoever waits looks for itself when its time is up.
                Err(error) => debug!(error = %error, "Waiting requests could not be looked after"),
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
