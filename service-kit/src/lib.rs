//! What every binary of the system needs: logging, shutdown, health, metrics, settings, and an HTTP server that answers
//! every error with a problem document (RFC 9457). It knows no rule of the shop; only the list of problem codes, which is
//! one for the whole API, names its nouns.

pub mod api;
pub mod config;
pub mod health;
pub mod healthcheck;
pub mod http;
pub mod idempotency;
pub mod input;
pub mod metrics;
pub mod openapi;
pub mod places;
pub mod problem;
pub mod server;
pub mod shutdown;
pub mod telemetry;

pub use problem::Problem;
