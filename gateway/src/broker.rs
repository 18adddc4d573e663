//! The connection to NATS, for reading order events. Everything else the gateway does goes on without it.

use std::time::Duration;

use anyhow::Context as _;
use async_nats::jetstream::{self, context::ContextBuilder};
use async_nats::{Client, ConnectOptions, Event};
use service_kit::config::Secret;
use tokio::sync::watch;
use tracing::{error, info, warn};

/// Longest wait for an answer of the broker.
pub(crate) const ANSWER_TIMEOUT: Duration = Duration::from_secs(4);
/// A dead peer is noticed after two of these.
const PING_INTERVAL: Duration = Duration::from_secs(5);
const RECONNECT_DELAY_MAX: Duration = Duration::from_millis(500);

/// Where NATS is and as whom to log in.
#[derive(Clone, Debug, clap::Args)]
pub struct BrokerArgs {
    /// NATS servers, separated by commas. Only live events need them.
    #[arg(long, env = "NATS_URL", default_value = "nats://127.0.0.1:4222")]
    pub nats_url: String,
    /// NATS user; also makes the inbox prefix `_INBOX_<user>` that the permissions allow.
    #[arg(long, env = "NATS_USER", default_value = "gateway")]
    pub nats_user: String,
    /// Password of the NATS user. Without it there are no live events.
    #[arg(long, env = "NATS_PASSWORD", hide_env_values = true)]
    pub nats_password: Option<Secret>,
}

/// A connection, kept for ever, cheap to clone.
#[derive(Clone)]
pub(crate) struct Broker {
    pub(crate) client: Client,
    pub(crate) jetstream: jetstream::Context,
    connection: watch::Receiver<Connection>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Connection {
    up: bool,
    /// How often it was made: another number means that the broker may have lost everything meanwhile.
    number: u64,
}

impl Broker {
    /// Begins to connect and returns at once; `None` if no password is set.
    pub(crate) async fn connect(arguments: BrokerArgs) -> anyhow::Result<Option<Self>> {
        let BrokerArgs {
            nats_url,
            nats_user,
            nats_password,
        } = arguments;
        let Some(password) = nats_password else {
            return Ok(None);
        };
        let (sender, connection) = watch::channel(Connection::default());
        let client =
            ConnectOptions::with_user_and_password(nats_user.clone(), password.expose().to_owned())
                .name("gateway")
                .custom_inbox_prefix(format!("_INBOX_{nats_user}"))
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
                        Event::ServerError(error) => {
                            error!(error = %error, "NATS refuses something")
                        }
                        Event::ClientError(error) => warn!(error = %error, "NATS client error"),
                        Event::SlowConsumer(_) | Event::LameDuckMode | Event::Draining => {
                            warn!(event = %event, "NATS event")
                        }
                    }
                    std::future::ready(())
                })
                .connect(nats_url.split(',').map(str::to_owned).collect::<Vec<_>>())
                .await
                .context("NATS_URL is not usable")?;
        let jetstream = ContextBuilder::new()
            .timeout(ANSWER_TIMEOUT)
            .build(client.clone());
        Ok(Some(Self {
            client,
            jetstream,
            connection,
        }))
    }

    /// Whether the connection stands right now, as far as is known.
    pub(crate) fn is_connected(&self) -> bool {
        self.connection.borrow().up
    }

    /// Which connection this is, counted from 1; 0 before the first.
    pub(crate) fn connection_number(&self) -> u64 {
        self.connection.borrow().number
    }

    /// Waits until the connection stands.
    pub(crate) async fn until_connected(&self) {
        self.until(|connection| connection.up).await;
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

/// Grows from 10 ms to the cap, times a factor from 0.5 to 1, so that gateways do not come back in step. The random tail of
/// a fresh UUID is good enough to spread them.
fn reconnect_delay(attempts: usize) -> Duration {
    let exponential = Duration::from_millis(10 << attempts.min(6)).min(RECONNECT_DELAY_MAX);
    let random = uuid::Uuid::new_v4().as_u128() as u16;
    exponential.mul_f64(0.5 + 0.5 * f64::from(random) / f64::from(u16::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gateways_do_not_come_back_in_step() {
        for attempts in [0, 1, 6, usize::MAX] {
            let exponential = Duration::from_millis(10 << attempts.min(6)).min(RECONNECT_DELAY_MAX);
            let delays: Vec<Duration> = (0..100).map(|_| reconnect_delay(attempts)).collect();
            assert!(
                delays
                    .iter()
                    .all(|delay| (exponential / 2..=exponential).contains(delay)),
                "{delays:?}"
            );
            assert!(delays.iter().any(|delay| *delay != delays[0]), "{delays:?}");
        }
    }
}
