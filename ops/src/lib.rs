//! The operator's tool `gozon`, and the checker behind it: whether what the two databases say fits together.

pub mod audit;
pub mod dead_letters;
pub mod history;
pub mod order;
pub mod outbox;
pub mod streams;
pub mod topology;
