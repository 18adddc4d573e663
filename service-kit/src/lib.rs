//! What every binary of the system needs and that knows no domain word: logging, shutdown, health, configuration
//! pieces, and an HTTP edge that answers every error as a problem document (RFC 9457).

pub mod config;
pub mod health;
pub mod healthcheck;
pub mod http;
pub mod idempotency;
pub mod input;
pub mod metrics;
pub mod openapi;
pub mod problem;
pub mod server;
pub mod shutdown;
pub mod telemetry;

pub use problem::Problem;
