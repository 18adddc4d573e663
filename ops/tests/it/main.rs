//! The audit reports every planted fault, and the tool shows what is stored.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

mod audit;
mod audit_streams;
mod dead_letters;
mod harness;
mod history;
mod streams;
