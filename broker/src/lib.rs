//! A process's connection to NATS, and the pauses between its retries.

mod backoff;
mod connection;

pub use backoff::{Backoff, jitter};
pub use connection::{ANSWER_TIMEOUT, Broker, BrokerConfig};
