//! A transaction that can enqueue events and hands them off to the relay after its commit.

use std::ops::Deref;
use std::sync::{Mutex, PoisonError};

use metrics::histogram;
use sea_orm::{DatabaseTransaction, DbErr, Statement};
use tokio::time::Instant;

use crate::metrics::TRANSACTION_SECONDS;
use crate::outbox::hand_off::HandOff;
use crate::outbox::message::Message;
use crate::outbox::table::{self, Pending};
use crate::postgres::{execute, sqlstate};
use crate::retry::{Failure, injected};

/// Dereferences to SeaORM's transaction. If dropped without a commit, it is rolled back together
/// with the enqueued rows.
#[derive(Debug)]
pub struct Transaction {
    inner: DatabaseTransaction,
    work: Work,
    begun: Instant,
    hand_off: HandOff,
    enqueued: Mutex<Vec<Pending>>,
}

/// Names the purpose of a transaction: its metric label and the prefix of its failpoints.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Work {
    pub(crate) label: &'static str,
    pub(crate) failpoints: &'static str,
}

impl Work {
    pub(crate) fn named(name: &'static str) -> Self {
        Self {
            label: name,
            failpoints: name,
        }
    }
}

impl Transaction {
    pub(crate) fn new(inner: DatabaseTransaction, work: Work, hand_off: HandOff) -> Self {
        Self {
            inner,
            work,
            begun: Instant::now(),
            hand_off,
            enqueued: Mutex::default(),
        }
    }

    /// Runs a statement and returns the number of affected rows.
    pub async fn execute(&self, statement: Statement) -> Result<u64, DbErr> {
        execute(&self.inner, statement).await
    }

    /// Stores messages to be published, in the same transaction as the change that they report.
    ///
    /// This is the only way to enqueue, so enqueueing outside a transaction does not compile.
    pub async fn enqueue(&self, messages: Vec<Message>) -> Result<(), DbErr> {
        let rows = table::insert(&self.inner, messages).await?;
        self.enqueued
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend(rows);
        Ok(())
    }

    /// Commits, then hands the enqueued rows off to the relay. If the outcome is unknown, nothing
    /// is handed off: if the rows exist, the relay finds them by polling.
    ///
    /// A serialization failure or a constraint violation means that the server rolled back. After
    /// any other error (no answer, server shutdown), the outcome is unknown.
    pub async fn commit(self) -> Result<(), Failure> {
        let Work { label, failpoints } = self.work;
        failpoint::of_work(failpoints, "before_commit")?;
        self.inner
            .commit()
            .await
            .map_err(|error| match sqlstate(&error) {
                Some(code) if code.starts_with("40") || code.starts_with("23") => {
                    Failure::NotDone(error)
                }
                _ => Failure::Unknown(error),
            })?;
        histogram!(TRANSACTION_SECONDS, "work" => label).record(self.begun.elapsed());
        failpoint::of_work(failpoints, "after_commit").map_err(|_| Failure::Unknown(injected()))?;
        let enqueued = self
            .enqueued
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        self.hand_off.hand_off(enqueued);
        Ok(())
    }

    pub async fn rollback(self) -> Result<(), DbErr> {
        self.inner.rollback().await
    }
}

impl Deref for Transaction {
    type Target = DatabaseTransaction;

    fn deref(&self) -> &DatabaseTransaction {
        &self.inner
    }
}
