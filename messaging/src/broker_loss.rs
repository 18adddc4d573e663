//! Broker loss: relay and consumer note that the broker lost acknowledged messages.
//! [`ask_again`](crate::ask_again) then re-asks.

use tokio::sync::watch;
use tokio::time::Instant;

/// The broker loss that this process has noticed. Clones share one state.
#[derive(Clone, Debug, Default)]
pub(crate) struct BrokerLoss(watch::Sender<Option<Instant>>);

impl BrokerLoss {
    /// Messages published before this moment may be lost; later ones are not.
    ///
    /// The moment is that of the loss, as far as it is known, not of its discovery. In a new
    /// installation the first requests are published before all streams and consumers exist, and
    /// none is lost.
    pub(crate) fn note(&self, before: Instant) {
        self.0.send_if_modified(|latest| {
            let is_later = *latest < Some(before);
            *latest = (*latest).max(Some(before));
            is_later
        });
    }

    /// The latest noted moment.
    pub(crate) fn watch(&self) -> watch::Receiver<Option<Instant>> {
        self.0.subscribe()
    }
}
