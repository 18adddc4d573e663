//! The gateway, with the test in the place of the services behind it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails there")]

mod cors;
mod forwarding;
mod harness;
mod limits;
mod openapi;
mod page;
mod problems;
mod starting;
mod wire;
