//! Tests of the orders service against a real PostgreSQL and a real NATS.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

mod faulty_delivery;
mod grouping;
mod harness;
mod held;
mod listing;
mod openapi;
mod placing;
mod reconciling;
mod settling;
mod snapshot;
mod unavailable;
