#![doc = include_str!("../README.md")]

mod ask_again;
mod backlog;
mod broker_loss;
mod database;
mod dead_letters;
mod flow;
mod health;
mod inbox;
mod metrics;
mod migration;
mod operator_api;
mod outbox;
mod pool;
mod postgres;
mod problem;
mod retention;
mod retry;
mod scan;
mod server_check;
mod settings;
mod subscriber;
#[cfg(feature = "testing")]
pub mod testing;
mod timeline;
mod topology;
mod transaction;

// Assemble and run a service.
pub use flow::Flow;
pub use migration::{migration, migrations};
pub use settings::FlowArgs;
pub use topology::{Begins, Stream, Subscription, TopologySettings};

// Change the database and enqueue events.
pub use database::Database;
pub use outbox::message::Message;
pub use postgres::{now, sql};
pub use retry::{Failure, Retryable, read, retry, retry_unless_locked};
pub use transaction::Transaction;

// Apply events of other services.
pub use subscriber::{Handled, LostRace, Quarantined, Received, Subscriber};

// Re-ask requests and re-arm answers.
pub use ask_again::{AnswerTable, AskPolicy, Request, RequestTable, Requests, rearm};

// Inspect and repair.
pub use backlog::Backlog;
pub use dead_letters::replay::{Replay, ReplayOutcome, replay};
pub use dead_letters::table::message_key;
pub use dead_letters::view::DeadLetter;
pub use inbox::message::read_message;
pub use operator_api::{FlowStatus, OperatorApi};
pub use outbox::resend::Resend;
pub use timeline::TimelineSteps;
