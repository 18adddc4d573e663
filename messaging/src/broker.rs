//! The connection to NATS: one per process, kept for ever, cheap to clone.

use std::time::Duration;

use anyhow::Context as _;
use async_nats::jetstream::{self, context::ContextBuilder};
use async_nats::{Client, ConnectOptions, Event};
use tokio::sync::watch;
use tracing::{error, info, warn};

/// Longest wait for a PubAck or an answer of the JetStream API. A relay holds row locks for this long at most.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(4);
/// A dead peer is noticed after two of these.
const PING_INTERVAL: Duration = Duration::from_secs(5);
const RECONNECT_DELAY_MAX: Duration = Duration::from_millis(500);
/// Acks of one connection that may be outstanding; above the largest relay batch.
const ACKS_IN_FLIGHT_MAX: usize = 1024;

/// Where NATS is and as whom to log in. Has no `Debug`: it holds a password.
#[derive(Clone)]
pub struct BrokerConfig {
    /// `nats://host:port`, several separated by commas.
    pub url: String,
    /// NATS user; also makes the inbox prefix `_INBOX_<user>` that the permissions allow.
    pub user: String,
    /// Its password.
    pub password: String,
    /// Name of the connection, as the server's monitor shows it.
    pub name: String,
}

/// A connection to NATS with JetStream.
#[derive(Clone)]
pub struct Broker {
    client: Client,
    jetstream: jetstream::Context,
    connection: watch::Receiver<Connection>,
}

/// The state of the connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Connection {
    up: bool,
    /// How often it was made: another number means that the broker may have lost everything meanwhile.
    number: u64,
}

impl Broker {
    /// Begins to connect and returns at once: a service starts and takes orders while the broker is away.
    pub async fn connect(config: BrokerConfig) -> anyhow::Result<Self> {
        let (sender, connection) = watch::channel(Connection::default());
        let client = ConnectOptions::with_user_and_password(config.user.clone(), config.password)
            .name(config.name)
            .custom_inbox_prefix(format!("_INBOX_{}", config.user))
            .retry_on_initial_connect()
            .ping_interval(PING_INTERVAL)
            .connection_timeout(ANSWER_TIMEOUT)
            .request_timeout(Some(ANSWER_TIMEOUT))
            .reconnect_delay_callback(reconnect_delay)
            .event_callback(move |event| {
                match &event {
                    Event::Connected => {
                        info!("Connected to NATS");
                        sender.send_modify(|connection| {
                            *connection = Connection {
                                up: true,
                                number: connection.number + 1,
                            }
                        });
                    }
                    Event::Disconnected | Event::Closed => {
                        warn!("Connection to NATS lost; reconnecting");
                        sender.send_modify(|connection| connection.up = false);
                    }
                    // A missing permission never fails the call, it only shows up here and as a time-out.
                    Event::ServerError(error) => error!(error = %error, "NATS refuses something"),
                    Event::ClientError(error) => warn!(error = %error, "NATS client error"),
                    Event::SlowConsumer(_) | Event::LameDuckMode | Event::Draining => {
                        warn!(event = %event, "NATS event")
                    }
                }
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

    /// The core NATS connection.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The JetStream side of it.
    pub fn jetstream(&self) -> &jetstream::Context {
        &self.jetstream
    }

    /// Whether the connection stands right now, as far as is known.
    pub fn is_connected(&self) -> bool {
        self.connection.borrow().up
    }

    /// Which connection this is, counted from 1; 0 before the first.
    pub(crate) fn connection_number(&self) -> u64 {
        self.connection.borrow().number
    }

    /// Waits until the connection stands.
    pub async fn until_connected(&self) {
        self.until(|connection| connection.up).await;
    }

    /// Waits until there is none.
    pub(crate) async fn until_disconnected(&self) {
        self.until(|connection| !connection.up).await;
    }

    /// Waits until there is another connection than this one.
    pub(crate) async fn until_reconnected(&self, number: u64) {
        self.until(|connection| connection.up && connection.number != number)
            .await;
    }

    async fn until(&self, wanted: impl FnMut(&Connection) -> bool) {
        let mut connection = self.connection.clone();
        if connection.wait_for(wanted).await.is_err() {
            // The client is gone, so the process is ending: there is nothing to wait for any more.
            std::future::pending::<()>().await;
        }
    }
}

/// Grows from 10 ms to the cap, with jitter so that services do not come back in step.
fn reconnect_delay(attempts: usize) -> Duration {
    let exponential = Duration::from_millis(10 << attempts.min(6));
    exponential.min(RECONNECT_DELAY_MAX).mul_f64(jitter())
}

/// A factor from 0.5 to 1, from the random tail of a fresh UUID: good enough to spread retries.
pub(crate) fn jitter() -> f64 {
    let random = uuid::Uuid::new_v4().as_u128() as u16;
    0.5 + 0.5 * f64::from(random) / f64::from(u16::MAX)
}
