//! Applying a batch inside a transaction. The consumer, the replay of dead letters and the test
//! harness all go through here.

use std::collections::HashMap;

use failpoint::{Injected, failpoint};
use sea_orm::DbErr;

use crate::dead_letters::table::{DeadMessage, Verdict};
use crate::inbox::message::{Incoming, distinct};
use crate::inbox::table::{self, Delivery};
use crate::postgres;
use crate::retry::Failure;
use crate::subscriber::{LostRace, Subscriber};
use crate::transaction::Transaction;

/// What a batch did, before anything is committed.
pub(crate) struct Applied<'a, T> {
    /// None if no message of the batch could be read.
    pub(crate) effect: Option<T>,
    pub(crate) first: usize,
    pub(crate) repeated: usize,
    pub(crate) dead: Vec<DeadMessage<'a>>,
}

/// Writes the inbox rows, calls the handler, and returns which messages are dead letters.
pub(crate) async fn apply<'a, S: Subscriber>(
    txn: &Transaction,
    subscriber: &S,
    batch: &[Incoming<'a, S::Event>],
) -> anyhow::Result<Applied<'a, S::Effect>> {
    let deliveries: Vec<Delivery> = batch.iter().filter_map(Incoming::delivery).collect();
    let first = table::record(txn, S::SUBSCRIPTION.consumer, &deliveries).await?;
    failpoint!("consumer.after_inbox")?;
    let (events, indexes) = distinct(batch, &first);
    let mut contradictions = HashMap::new();
    let mut effect = None;
    if !events.is_empty() {
        let handled = subscriber.handle(txn, &events).await?;
        let causes = handled.quarantined.into_iter();
        contradictions = causes.map(|one| (one.index, one.cause)).collect();
        effect = Some(handled.effect);
    }
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
        first: first.len(),
        repeated: deliveries.len().saturating_sub(first.len()),
    })
}

/// What an error of a batch concerns.
#[derive(Debug)]
pub(crate) enum Blame {
    /// The database as a whole: it does not answer.
    Database(anyhow::Error),
    /// A row, for now: a lock is not granted, or the database refuses with a transient error.
    Row(anyhow::Error),
    /// A message. An error that is neither of the database nor a lost race is a bug or bad data,
    /// and would come back every time.
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

    /// Another transaction inserted the row first. The next try sees it.
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

/// The failure that an error of a batch amounts to, where only a failure can be retried.
pub(crate) fn as_failure(error: anyhow::Error) -> Failure {
    let cause = find_database_error(&error).cloned();
    // A lost race is no error of the database, but it ends in the same way: the next try sees the
    // row.
    Failure::NotDone(
        cause.unwrap_or_else(|| DbErr::Conn(sea_orm::RuntimeErr::Internal(format!("{error:#}")))),
    )
}
