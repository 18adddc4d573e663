//! The operator's tool `gozon`. [`audit`] checks that the two databases are consistent.

pub mod audit;
pub mod dead_letters;
pub mod history;
pub mod order;
pub mod outbox;
pub mod streams;
pub mod topology;
