//! The protocol of Gozon, model-checked: every way in which steps, deaths, losses and repetitions can follow each other,
//! within bounds, is tried, and the promise looked at after each.
//!
//! `just model` runs it at length. The tests run the small models and show that each guard of the design is needed:
//! without it, a property is violated, with the shortest way there.
//!
//! The failpoints of the code have their places in the model ([`action::Place`]).

pub mod action;
pub mod check;
pub mod design;
pub mod model;
pub mod properties;
pub mod recovery;
pub mod state;
