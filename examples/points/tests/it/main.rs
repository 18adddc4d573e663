//! The example under faults, and beside a real broker.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails there")]

mod faults;
mod reading;
