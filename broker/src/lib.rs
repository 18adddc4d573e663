//! The connection of a process to NATS, and the pauses between retries.

mod backoff;
mod connection;

pub use backoff::{Backoff, jitter};
pub use connection::{ANSWER_TIMEOUT, Broker, BrokerConfig};
