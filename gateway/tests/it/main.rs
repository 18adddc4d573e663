//! Tests of the gateway with a scripted backend instead of the services.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

mod bulkheads;
mod cors;
mod forwarding;
mod harness;
mod limits;
mod openapi;
mod page;
mod problems;
mod starting;
mod wire;
