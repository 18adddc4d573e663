//! Everything that all binaries need: logging, shutdown, health checks, metrics, settings, and an
//! HTTP server that answers every error with a problem document (RFC 9457). It contains no business
//! rules. Only the list of problem codes uses domain words, because the whole API has one list.

pub mod api;
pub mod config;
pub mod health;
pub mod healthcheck;
pub mod http;
pub mod idempotency;
pub mod input;
pub mod metrics;
pub mod openapi;
pub mod problem;
pub mod runtime;
pub mod server;
pub mod shutdown;
pub mod slots;
pub mod telemetry;

pub use problem::Problem;
