//! The checker is not blind: every fault that is planted is named.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails there")]

mod audit;
mod audit_streams;
mod dead_letters;
mod harness;
mod history;
mod streams;
