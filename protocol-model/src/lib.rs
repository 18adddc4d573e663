//! A model of Gozon's protocol. The checker tries every possible sequence of steps, crashes, losses
//! and repetitions, within bounds, and checks the properties in every state.
//!
//! `./dev model` runs the large models. The tests run the small ones and show that each guard of
//! the design is needed: without it, a property is violated. `--ways` prints the shortest path to
//! each violation.
//!
//! Each failpoint of the code belongs to a crash point of the model ([`action::CrashPoint`]).

pub mod action;
pub mod broken;
pub mod check;
pub mod design;
mod explore;
pub mod model;
pub mod properties;
pub mod recovery;
pub mod state;
