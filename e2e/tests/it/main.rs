//! Tests of the whole system through its front door, with real processes. `checkout` is the story; read it first.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails there")]

mod chaos;
mod checkout;
mod cluster;
mod demo;
mod disk;
mod economy;
mod events;
mod examples;
mod faults;
mod idempotency;
mod kill_matrix;
mod metrics;
mod names;
mod network;
mod operating;
mod operators;
mod permissions;
mod shop;
mod timeline;
