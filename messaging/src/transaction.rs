//! A transaction that can enqueue events and hands them off to the relay after its commit.

use std::collections::HashSet;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use metrics::histogram;
use sea_orm::prelude::async_trait::async_trait;
use sea_orm::{ConnectionTrait, DbBackend, DbErr, ExecResult, QueryResult, Statement};
use tokio::time::Instant;
use uuid::Uuid;

use crate::inbox::table::Arrivals;
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
    inbox: Mutex<Inbox>,
}

/// The inbox rows of a transaction.
#[derive(Debug, Default)]
struct Inbox {
    /// Rows that are not stored yet.
    arrivals: Option<Arrivals>,
    /// Rows that are stored, and how many of their events are new.
    recorded: Option<(Arrivals, u64)>,
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
            inbox: Mutex::default(),
        }
    }

    /// Runs a statement and returns the number of affected rows.
    pub async fn execute(&self, statement: Statement) -> Result<u64, DbErr> {
        execute(self, statement).await
    }

    /// Stores messages to be published, in the same transaction as the change that they report.
    ///
    /// Messages cannot be enqueued in any other way, so enqueueing without a change does not
    /// compile.
    pub async fn enqueue(&self, messages: Vec<Message>) -> Result<(), DbErr> {
        let rows = table::insert(self, messages).await?;
        self.enqueued
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend(rows);
        Ok(())
    }

    /// Changes the database and enqueues messages in one statement, which saves a round trip.
    ///
    /// `change` is a list of common table expressions as they follow `WITH`. The last one is named
    /// `changed`. Its rows have a column `event_id`, and exactly the messages with these event ids
    /// are enqueued. Returns the rows of `changed`.
    pub async fn change_and_enqueue(
        &self,
        change: Statement,
        messages: Vec<Message>,
    ) -> Result<Vec<QueryResult>, DbErr> {
        let arrivals = self.inbox().arrivals.take();
        let (statement, rows) = table::with_insert(change, messages, arrivals.as_ref());
        let mut changed = self.query_all_raw(statement).await?;
        if let Some(arrivals) = arrivals {
            // There is at least one row, also if nothing was changed.
            let first = changed.first().map(|row| row.try_get("", "recorded"));
            let first: i64 = first.unwrap_or(Ok(0))?;
            self.inbox().recorded = Some((arrivals, first.unsigned_abs()));
            if let [row] = &changed[..]
                && row.try_get::<Option<Uuid>>("", "event_id")?.is_none()
            {
                changed.clear();
            }
        }
        let rows = enqueued_among(rows, &changed)?;
        self.enqueued
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend(rows);
        Ok(changed)
    }

    /// These inbox rows are stored by the next change, or by [`recorded`](Self::recorded).
    pub(crate) fn record_with_next_change(&self, arrivals: Arrivals) {
        if !arrivals.is_empty() {
            self.inbox().arrivals = Some(arrivals);
        }
    }

    /// Stores the inbox rows if no change has done so, and counts repetitions. Returns the number
    /// of new events.
    pub(crate) async fn recorded(&self) -> Result<u64, DbErr> {
        let Inbox { arrivals, recorded } = std::mem::take(&mut *self.inbox());
        let (arrivals, first) = match (arrivals, recorded) {
            (_, Some(recorded)) => recorded,
            (Some(arrivals), None) => {
                let first = arrivals.record(self).await?;
                (arrivals, first)
            }
            (None, None) => return Ok(0),
        };
        arrivals.count_repeats(self, first).await?;
        Ok(first)
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
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
        open.end("COMMIT").await.map_err(failed_commit)?;
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

/// The messages that a change has enqueued.
pub(crate) fn enqueued_among(
    messages: Vec<Pending>,
    changed: &[QueryResult],
) -> Result<Vec<Pending>, DbErr> {
    let ids = changed.iter().map(|row| row.try_get("", "event_id"));
    let ids: HashSet<Uuid> = ids.collect::<Result<_, _>>()?;
    let messages = messages.into_iter();
    Ok(messages.filter(|one| ids.contains(&one.event_id)).collect())
}

/// Whether a commit that failed has certainly changed nothing.
fn failed_commit(error: DbErr) -> Failure {
    match sqlstate(&error) {
        Some(code) if code.starts_with("40") || code.starts_with("23") => Failure::NotDone(error),
        _ => Failure::Unknown(error),
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
