//! Creates missing streams of a service and detects broker loss.

use std::collections::HashMap;
use std::time::Duration;

use async_nats::jetstream::stream;
use broker::{Backoff, Broker};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::broker_loss::BrokerLoss;
use crate::database::Database;
use crate::health::HealthStatus;
use crate::outbox::table;
use crate::postgres::within;
use crate::topology::{self, Ensured, Stream, StreamState, TopologySettings};

/// Interval of the checks while nothing fails: an idle relay would not notice that a stream is
/// gone.
const CHECK_INTERVAL: Duration = Duration::from_secs(10);
const RETRY_DELAY_MIN: Duration = Duration::from_millis(100);
const RETRY_DELAY_MAX: Duration = Duration::from_secs(5);
const QUERY_TIMEOUT: Duration = Duration::from_secs(20);

pub(crate) struct StreamWatch {
    pub(crate) db: Database,
    pub(crate) broker: Broker,
    pub(crate) streams: Vec<Stream>,
    pub(crate) settings: TopologySettings,
    pub(crate) loss: BrokerLoss,
    pub(crate) health: HealthStatus,
    /// Requests an immediate check.
    pub(crate) check: Notify,
    /// Number of the newest connection on which all streams exist.
    checked: watch::Sender<u64>,
}

impl StreamWatch {
    pub(crate) fn new(
        db: Database,
        broker: Broker,
        streams: Vec<Stream>,
        settings: TopologySettings,
        loss: BrokerLoss,
        health: HealthStatus,
    ) -> Self {
        Self {
            db,
            broker,
            streams,
            settings,
            loss,
            health,
            check: Notify::new(),
            checked: watch::Sender::new(0),
        }
    }

    /// Waits until the streams were checked on this connection.
    pub(crate) async fn until_checked(&self, connection_number: u64) {
        let mut checked = self.checked.subscribe();
        // The sender lives as long as `self`.
        let _ = checked
            .wait_for(|number| *number == connection_number)
            .await;
    }

    /// Checks the streams on every new connection, when publishing finds a stream missing, and
    /// periodically.
    pub(crate) async fn run(&self, shutdown: &CancellationToken) {
        let mut states = HashMap::new();
        let mut backoff = Backoff::new(RETRY_DELAY_MIN, RETRY_DELAY_MAX);
        while !shutdown.is_cancelled() {
            if !self.broker.is_connected() {
                self.health.bad("the broker is away");
                shutdown
                    .run_until_cancelled(self.broker.until_connected())
                    .await;
                continue;
            }
            let connection_number = self.broker.connection_number();
            let pause = match self.check_streams(&mut states).await {
                Ok(()) => {
                    self.health.good();
                    self.checked.send_replace(connection_number);
                    backoff.reset();
                    CHECK_INTERVAL
                }
                Err(error) => {
                    if self.health.bad(format!("{error:#}")) {
                        warn!(
                            error = format!("{error:#}"),
                            "A stream cannot be checked or created; retrying"
                        );
                    }
                    backoff.pause()
                }
            };
            tokio::select! {
                () = shutdown.cancelled() => {}
                () = tokio::time::sleep(pause) => {}
                () = self.check.notified() => {}
                () = self.broker.until_reconnected(connection_number) => {}
            }
        }
    }

    /// Reports a broker loss if a stream is new, even if another process created it, or if its last
    /// sequence is lower than at the last check.
    async fn check_streams(&self, states: &mut HashMap<String, StreamState>) -> anyhow::Result<()> {
        let mut failure = None;
        for stream in &self.streams {
            let begun = Instant::now();
            let wanted = stream.config(&self.settings);
            // A stream that cannot be created must not delay the rows of other streams.
            let (state, ensured) =
                match topology::ensure_stream(self.broker.jetstream(), &wanted).await {
                    Ok(found) => found,
                    Err(error) => {
                        failure = Some(error);
                        continue;
                    }
                };
            let earlier = states.get(stream.name);
            let lost_messages = earlier.is_some_and(|earlier| {
                earlier.created_at != state.created_at
                    || earlier.last_sequence > state.last_sequence
            });
            if earlier.is_none_or(|earlier| earlier.drift != state.drift) {
                warn_of_drift(&wanted, &state);
            }
            states.insert(wanted.name, state);
            if ensured == Ensured::Created || lost_messages {
                // If we created the stream, it was missing when this check began, so only earlier
                // messages are lost. If someone else created or truncated it, we do not know when;
                // assume now.
                let before = match ensured {
                    Ensured::Created => begun,
                    Ensured::Found => Instant::now(),
                };
                self.note_loss(stream, before).await;
            }
        }
        failure.map_or(Ok(()), Err)
    }

    async fn note_loss(&self, stream: &Stream, before: Instant) {
        // No request depends on a copy of a dead letter.
        if !stream.holds_dead_letters() {
            self.loss.note(before);
        }
        // A new installation has nothing to lose.
        let published = within(QUERY_TIMEOUT, table::has_published(&self.db)).await;
        if published.unwrap_or(true) {
            warn!(
                stream = stream.name,
                "The broker lost messages that it had acknowledged; pending requests are \
                 published again"
            );
        }
    }
}

fn warn_of_drift(wanted: &stream::Config, state: &StreamState) {
    for difference in &state.drift {
        warn!(
            stream = wanted.name,
            difference, "Stream differs from what this version would create; it is left as it is"
        );
    }
}
