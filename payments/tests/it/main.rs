//! Tests of the payments service against a real PostgreSQL and a real NATS.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

mod accounts;
mod charging;
mod faulty_delivery;
mod harness;
mod held;
mod openapi;
mod poison;
