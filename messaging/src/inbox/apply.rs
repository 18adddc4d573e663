//! Applies a batch inside a transaction. The consumer, the replay of dead letters and the test
//! harness use this code.

use std::collections::HashMap;

use failpoint::{Injected, failpoint};
use sea_orm::DbErr;

use crate::dead_letters::table::{DeadMessage, Verdict};
use crate::inbox::message::{Incoming, distinct};
use crate::inbox::table::{Arrivals, Delivery};
use crate::postgres;
use crate::retry::Failure;
use crate::subscriber::{LostRace, Subscriber};
use crate::transaction::Transaction;

/// After this many blocked keys, keys that fail together are no longer separated: the whole table
/// may be locked, and further halving would take seconds. Messages that are not the cause are
/// deferred too, and applied soon.
pub(crate) const BLOCKED_KEYS_MAX: usize = 3;

/// The result of applying a batch, before the commit.
pub(crate) struct Applied<'a, T> {
    /// `None` if no message of the batch could be decoded.
    pub(crate) effect: Option<T>,
    pub(crate) first: usize,
    pub(crate) repeated: usize,
    pub(crate) dead: Vec<DeadMessage<'a>>,
}

/// Calls the handler, writes the inbox rows, and returns the dead letters.
///
/// The inbox rows are written by the first statement of the handler that changes something, which
/// saves a round trip, or after it. The order does not matter: effects are guarded by business
/// rows.
pub(crate) async fn apply<'a, S: Subscriber>(
    txn: &Transaction,
    subscriber: &S,
    batch: &[Incoming<'a, S::Event>],
) -> anyhow::Result<Applied<'a, S::Effect>> {
    let deliveries: Vec<Delivery> = batch.iter().filter_map(Incoming::delivery).collect();
    txn.record_with_next_change(Arrivals::new(S::SUBSCRIPTION.consumer, &deliveries));
    let (events, indexes) = distinct(batch);
    let mut contradictions = HashMap::new();
    let mut effect = None;
    if !events.is_empty() {
        let handled = subscriber.handle(txn, &events).await?;
        let causes = handled.quarantined.into_iter();
        contradictions = causes.map(|one| (one.index, one.cause)).collect();
        effect = Some(handled.effect);
    }
    let first = usize::try_from(txn.recorded().await?).unwrap_or(usize::MAX);
    failpoint!("consumer.after_handle")?;
    let dead = batch.iter().zip(indexes).filter_map(|(incoming, index)| {
        let verdict = match &incoming.content {
            Err(cause) => Verdict::Poison(cause.clone()),
            Ok(_) => Verdict::Quarantine(contradictions.get(&index?)?.clone()),
        };
        Some(DeadMessage::new(incoming, verdict))
    });
    Ok(Applied {
        dead: dead.collect(),
        effect,
        first,
        repeated: deliveries.len().saturating_sub(first),
    })
}

/// The cause of a failed batch.
#[derive(Debug)]
pub(crate) enum Blame {
    /// The database does not answer.
    Database(anyhow::Error),
    /// A row is locked, or the database refuses it with a transient error.
    Row(anyhow::Error),
    /// A message can never be applied. An error that is neither a database error nor a lost race is
    /// a bug or bad data, and would occur every time.
    Message(anyhow::Error),
}

impl Blame {
    pub(crate) fn of(error: anyhow::Error) -> Self {
        if error.chain().any(<dyn std::error::Error>::is::<Injected>) {
            return Self::Database(error);
        }
        match find_database_error(&error) {
            Some(found)
                if !postgres::is_transient(found) || postgres::is_unique_violation(found) =>
            {
                Self::Message(error)
            }
            Some(found) if postgres::is_away(found) => Self::Database(error),
            Some(_) => Self::Row(error),
            None => Self::Message(error),
        }
    }

    /// Whether another transaction inserted the row first. The next attempt sees the row.
    pub(crate) fn is_lost_race(&self) -> bool {
        let error = self.error();
        error.chain().any(<dyn std::error::Error>::is::<LostRace>)
            || find_database_error(error).is_some_and(postgres::is_unique_violation)
    }

    pub(crate) fn is_lock_timeout(&self) -> bool {
        find_database_error(self.error()).is_some_and(postgres::is_lock_timeout)
    }

    pub(crate) fn into_error(self) -> anyhow::Error {
        let (Self::Database(error) | Self::Row(error) | Self::Message(error)) = self;
        error
    }

    fn error(&self) -> &anyhow::Error {
        let (Self::Database(error) | Self::Row(error) | Self::Message(error)) = self;
        error
    }
}

/// Whether the same batch can succeed later.
pub(crate) fn is_transient(error: &anyhow::Error) -> bool {
    error
        .chain()
        .any(|cause| cause.is::<LostRace>() || cause.is::<Injected>())
        || find_database_error(error).is_some_and(postgres::is_transient)
}

fn find_database_error(error: &anyhow::Error) -> Option<&DbErr> {
    error.chain().find_map(|cause| {
        if let Some(Failure::NotDone(error) | Failure::Unknown(error)) = cause.downcast_ref() {
            return Some(error);
        }
        cause.downcast_ref()
    })
}

/// Converts an error of a batch to a [`Failure`].
pub(crate) fn as_failure(error: anyhow::Error) -> Failure {
    let cause = find_database_error(&error).cloned();
    // A lost race is not a database error, but is retried like a unique violation: the next attempt
    // sees the row.
    Failure::NotDone(
        cause.unwrap_or_else(|| DbErr::Conn(sea_orm::RuntimeErr::Internal(format!("{error:#}")))),
    )
}
