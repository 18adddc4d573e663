//! That the broker lost messages it had acknowledged: noted by relay and consumer, acted on by
//! [`ask_again`](crate::ask_again).

use tokio::sync::watch;
use tokio::time::Instant;

/// What one process has noticed. Clones share one state.
#[derive(Clone, Debug, Default)]
pub(crate) struct BrokerLoss(watch::Sender<Option<Instant>>);

impl BrokerLoss {
    /// What was published before this moment may be lost; what was published after it is not.
    ///
    /// The moment is that of the loss, as far as it is known, not of its discovery: in a new
    /// installation the first orders are published before all streams and consumers exist, and
    /// none of them is lost.
    pub(crate) fn note(&self, before: Instant) {
        self.0.send_if_modified(|latest| {
            let is_later = *latest < Some(before);
            *latest = (*latest).max(Some(before));
            is_later
        });
    }

    /// The latest moment that was noted.
    pub(crate) fn watch(&self) -> watch::Receiver<Option<Instant>> {
        self.0.subscribe()
    }
}
