//! The operator's tool `gozon`, and the checker behind it: whether what the two databases say fits together.

pub mod audit;
pub mod dlq;
pub mod history;
pub mod look;
pub mod stream;
