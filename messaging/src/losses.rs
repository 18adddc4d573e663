//! That the broker lost what it had acknowledged: noticed by relay and consumer, acted on by whoever can ask again.

use tokio::sync::watch;
use tokio::time::Instant;

/// What one process has noticed. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Losses(watch::Sender<Option<Instant>>);

impl Losses {
    /// What was published before this moment may be lost; what was published after it is not.
    ///
    /// The moment is that of the loss, as far as it is known, and not that of finding it out: in an installation that is just
    /// made, the first orders are on their way before everything is there, and none of them is lost.
    pub fn note(&self, before: Instant) {
        self.0.send_if_modified(|latest| {
            let news = *latest < Some(before);
            *latest = (*latest).max(Some(before));
            news
        });
    }

    /// The latest moment that was noted.
    pub fn watch(&self) -> watch::Receiver<Option<Instant>> {
        self.0.subscribe()
    }
}
