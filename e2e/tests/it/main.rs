//! Tests of the whole system through the gateway, with real processes. Read `checkout` first.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

mod bulkheads;
mod chaos;
mod checkout;
mod clock;
mod cluster;
mod demo;
mod disk;
mod economy;
mod events;
mod examples;
mod faults;
mod healing;
mod idempotency;
mod kill_matrix;
mod listeners;
mod metrics;
mod names;
mod network;
mod operating;
mod operators;
mod permissions;
mod shop;
mod timeline;
