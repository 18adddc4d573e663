//! Tests of the example: under delivery faults, and with a running system.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

mod faults;
mod reading;
