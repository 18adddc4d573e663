//! The connection to NATS that every process of the system keeps, and the pauses between retries.

mod backoff;
mod connection;

pub use backoff::{Backoff, jitter};
pub use connection::{ANSWER_TIMEOUT, Broker, BrokerConfig};
