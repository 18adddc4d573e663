//! Tests of the connection pool and of the outbox relay against a real PostgreSQL and a real NATS.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

mod connections;
mod harness;
mod relay;
