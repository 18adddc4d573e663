//! Tests of the outbox relay against a real PostgreSQL and a real NATS.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails there")]

mod database;
mod harness;
mod relay;
