//! One connection per process. It reconnects for ever and is cheap to clone.

use std::time::Duration;

use anyhow::Context as _;
use async_nats::jetstream::{self, context::ContextBuilder};
use async_nats::{Client, ConnectOptions, Event};
use service_kit::config::Secret;
use tokio::sync::watch;
use tracing::{error, info, warn};

use crate::backoff::jitter;

/// Longest wait for a PubAck or an answer of the JetStream API.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(4);
/// A dead connection is noticed after two of these.
const PING_INTERVAL: Duration = Duration::from_secs(5);
const RECONNECT_DELAY_MAX: Duration = Duration::from_millis(500);
/// Maximum number of outstanding PubAcks per connection. Larger than the largest relay batch.
const ACKS_IN_FLIGHT_MAX: usize = 1024;

/// The address of NATS and the credentials.
#[derive(Clone, Debug)]
pub struct BrokerConfig {
    /// `nats://host:port`, several separated by commas.
    pub url: String,
    /// NATS user. Its permissions allow the inbox prefix `_INBOX_<user>`.
    pub user: String,
    pub password: Secret,
    /// Name of the connection in the monitoring of the server.
    pub name: String,
}

/// A connection to NATS with JetStream.
#[derive(Clone)]
pub struct Broker {
    client: Client,
    jetstream: jetstream::Context,
    connection: watch::Receiver<Connection>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Connection {
    up: bool,
    number: u64,
}

impl Broker {
    /// Starts to connect and returns at once: a service starts and works without the broker.
    pub async fn connect(config: BrokerConfig) -> anyhow::Result<Self> {
        let (sender, connection) = watch::channel(Connection::default());
        let password = config.password.expose().to_owned();
        let client = ConnectOptions::with_user_and_password(config.user.clone(), password)
            .name(config.name)
            .custom_inbox_prefix(format!("_INBOX_{}", config.user))
            .retry_on_initial_connect()
            .ping_interval(PING_INTERVAL)
            .connection_timeout(ANSWER_TIMEOUT)
            .request_timeout(Some(ANSWER_TIMEOUT))
            .reconnect_delay_callback(reconnect_delay)
            .event_callback(move |event| {
                note(&event, &sender);
                std::future::ready(())
            })
            .connect(config.url.split(',').map(str::to_owned).collect::<Vec<_>>())
            .await
            .context("NATS_URL is not usable")?;
        let jetstream = ContextBuilder::new()
            .timeout(ANSWER_TIMEOUT)
            .max_ack_inflight(ACKS_IN_FLIGHT_MAX)
            .build(client.clone());
        Ok(Self {
            client,
            jetstream,
            connection,
        })
    }

    pub fn client(&self) -> &Client {
        &self.client
    }

    pub fn jetstream(&self) -> &jetstream::Context {
        &self.jetstream
    }

    /// Whether the connection is up right now, as far as the client knows.
    pub fn is_connected(&self) -> bool {
        self.connection.borrow().up
    }

    /// Number of the current connection, counted from 1; 0 before the first. If the number has
    /// changed, the broker may have lost everything in between.
    pub fn connection_number(&self) -> u64 {
        self.connection.borrow().number
    }

    pub async fn until_connected(&self) {
        self.until(|connection| connection.up).await;
    }

    pub async fn until_disconnected(&self) {
        self.until(|connection| !connection.up).await;
    }

    /// Waits for a connection with another number.
    pub async fn until_reconnected(&self, number: u64) {
        self.until(|connection| connection.up && connection.number != number)
            .await;
    }

    async fn until(&self, wanted: impl FnMut(&Connection) -> bool) {
        let mut connection = self.connection.clone();
        if connection.wait_for(wanted).await.is_err() {
            // The client was dropped because the process is ending: no event will come.
            std::future::pending::<()>().await;
        }
    }
}

fn note(event: &Event, connection: &watch::Sender<Connection>) {
    match event {
        Event::Connected => {
            info!("Connected to NATS");
            connection.send_modify(|connection| {
                connection.up = true;
                connection.number += 1;
            });
        }
        Event::Disconnected | Event::Closed => {
            warn!("Connection to NATS lost; reconnecting");
            connection.send_modify(|connection| connection.up = false);
        }
        // A missing permission does not fail the call: it is reported here, and the call times out.
        Event::ServerError(error) => error!(error = %error, "NATS server error"),
        Event::ClientError(error) => warn!(error = %error, "NATS client error"),
        Event::SlowConsumer(_) | Event::LameDuckMode | Event::Draining => {
            warn!(event = %event, "NATS event");
        }
    }
}

/// Doubles from 10 ms to the cap. [`Backoff`](crate::Backoff) does not fit, because the client
/// counts the attempts.
fn reconnect_delay(attempts: usize) -> Duration {
    let exponential = Duration::from_millis(10 << attempts.min(6));
    exponential.min(RECONNECT_DELAY_MAX).mul_f64(jitter())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_do_not_reconnect_at_the_same_time() {
        for attempts in [0, 1, 6, usize::MAX] {
            let longest = Duration::from_millis(10 << attempts.min(6)).min(RECONNECT_DELAY_MAX);
            let delays: Vec<Duration> = (0..100).map(|_| reconnect_delay(attempts)).collect();
            let in_range = |delay: &Duration| (longest / 2..=longest).contains(delay);
            assert!(delays.iter().all(in_range), "{delays:?}");
            assert!(delays.iter().any(|delay| *delay != delays[0]), "{delays:?}");
        }
    }
}
