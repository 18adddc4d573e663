//! A transaction that can enqueue events and hands them off to the relay after its commit.

use std::fmt;
use std::sync::{Mutex, PoisonError};

use metrics::histogram;
use sea_orm::prelude::async_trait::async_trait;
use sea_orm::{ConnectionTrait, DbBackend, DbErr, ExecResult, QueryResult, Statement};
use tokio::time::Instant;

use crate::metrics::TRANSACTION_SECONDS;
use crate::outbox::hand_off::HandOff;
use crate::outbox::message::Message;
use crate::outbox::table::{self, Pending};
use crate::pool::OpenTransaction;
use crate::postgres::{execute, sqlstate};
use crate::retry::{Failure, injected};

/// If dropped without a commit, it is rolled back together with the enqueued rows.
pub struct Transaction {
    open: tokio::sync::Mutex<OpenTransaction>,
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
    pub(crate) fn new(open: OpenTransaction, work: Work, hand_off: HandOff) -> Self {
        Self {
            open: open.into(),
            work,
            begun: Instant::now(),
            hand_off,
            enqueued: Mutex::default(),
        }
    }

    /// Runs a statement and returns the number of affected rows.
    pub async fn execute(&self, statement: Statement) -> Result<u64, DbErr> {
        execute(self, statement).await
    }

    /// Stores messages to be published, in the same transaction as the change that they report.
    ///
    /// This is the only way to enqueue, so enqueueing outside a transaction does not compile.
    pub async fn enqueue(&self, messages: Vec<Message>) -> Result<(), DbErr> {
        let rows = table::insert(self, messages).await?;
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
        let open = self.open.into_inner();
        open.end("COMMIT")
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
        self.open.into_inner().end("ROLLBACK").await
    }
}

impl fmt::Debug for Transaction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transaction")
            .field("work", &self.work)
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl ConnectionTrait for Transaction {
    fn get_database_backend(&self) -> DbBackend {
        DbBackend::Postgres
    }

    async fn execute_raw(&self, statement: Statement) -> Result<ExecResult, DbErr> {
        self.open.lock().await.lease()?.execute(statement).await
    }

    async fn execute_unprepared(&self, text: &str) -> Result<ExecResult, DbErr> {
        self.open.lock().await.lease()?.execute_plain(text).await
    }

    async fn query_one_raw(&self, statement: Statement) -> Result<Option<QueryResult>, DbErr> {
        self.open.lock().await.lease()?.query_one(statement).await
    }

    async fn query_all_raw(&self, statement: Statement) -> Result<Vec<QueryResult>, DbErr> {
        self.open.lock().await.lease()?.query_all(statement).await
    }
}
