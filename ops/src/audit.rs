//! Checks the promise on real data: orders, decisions, transfers, balances, outboxes, inboxes and
//! dead letters are compared across both databases, and with the streams and a client's history.
//!
//! The audit takes no locks and runs on a live system. It reads one database after the other, so
//! work in progress can look wrong. A finding therefore counts only if a second pass, after a
//! grace period, finds it again.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use async_nats::jetstream;
use sea_orm::{
    ConnectionTrait as _, DatabaseConnection, DbBackend, DbErr, FromQueryResult, Statement, Value,
};
use serde::Serialize;

use crate::history::History;

mod books;
mod flow;
mod history;
mod orders;
mod streams;

/// The invariant that a finding violates is in parentheses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FindingKind {
    /// FINISHED, but without a decision or debit (I2).
    FinishedWithoutDebit,
    /// CANCELLED, but debited (I2).
    CancelledButDebited,
    /// Debited more than once (I1).
    DoubledDebit,
    /// The final status contradicts the decision (I2).
    StatusDisagrees,
    /// Order and decision, or decision and debit, differ in user or amount (I2).
    Divergent,
    /// A decision without its debit, or a debit without its decision (I2, I3).
    Unmatched,
    /// A decision or debit without an order, or a row that no request of the history explains (I8).
    Unexpected,
    /// NEW for longer than recovery takes (I7).
    Stuck,
    /// NEW, and a message about it is an unresolved dead letter (I7).
    Quarantined,
    /// The balance is not the sum of the transfers (I3).
    BalanceDrift,
    /// A balance below zero, stored or read by a client (I4).
    NegativeBalance,
    /// The entries of an account are not consecutive (I3).
    BrokenStatement,
    /// A transfer that is neither a valid deposit nor a valid payment (I3).
    MalformedTransfer,
    /// One idempotency key created two rows, or two answers claim to be the first (I5, I9).
    DoubledKey,
    /// The event of an order or decision is missing from the outbox.
    MissingEvent,
    /// The inbox lists a message about an order, but the message had no effect (I7).
    NotApplied,
    /// An outbox row has been unpublished for too long.
    LatePublication,
    /// A message that was not applied and needs an operator.
    DeadLetter,
    /// A message in a stream contradicts the databases (I2, I8).
    FalseMessage,
    /// A message in a stream has an event id that its order or decision does not have (I8).
    ForeignMessage,
    /// A message in a stream cannot be decoded and is not a dead letter.
    UnreadableMessage,
    /// Answered with 2xx, but not stored (I5).
    Lost,
    /// The answers to one key are not byte-identical (I9).
    AnswersDiffer,
    /// Every answer denies it, but it was done (I9).
    DeniedButDone,
    /// A repetition with the same content was refused as different content (I9).
    RepetitionRefused,
    /// Different content under a used key was applied (I10).
    OtherContentApplied,
    /// A final order was later seen in another state (I6).
    StatusBackwards,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Finding {
    pub kind: FindingKind,
    /// The order, user, transfer, event or dead letter concerned.
    pub id: String,
    /// One sentence for people.
    pub detail: String,
}

/// What an audit checked (all numbers are counts) and found.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    pub orders: u64,
    pub by_status: BTreeMap<String, u64>,
    pub decisions: u64,
    pub transfers: u64,
    pub accounts: u64,
    /// Messages in the streams.
    pub messages: u64,
    /// Parts that could not be checked, each with the reason.
    pub not_looked_at: Vec<String>,
    /// Exchanges of the client's history.
    pub exchanges: u64,
    pub findings: Vec<Finding>,
}

#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Time between the two passes. A finding counts only if both passes have it.
    pub grace: Duration,
    /// A NEW order is stuck when it is older than this.
    pub stuck_after: Duration,
    /// An outbox row is late when it is older than this.
    pub late_after: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            grace: Duration::from_secs(5),
            // The longest interval between two re-asks, plus a minute for the answer.
            stuck_after: Duration::from_secs(11 * 60),
            late_after: Duration::from_secs(60),
        }
    }
}

#[derive(Clone, Debug)]
pub struct Databases {
    pub orders: DatabaseConnection,
    pub payments: DatabaseConnection,
}

/// Further sources that the databases are compared with.
#[derive(Clone, Copy, Default)]
pub struct CompareWith<'a> {
    /// A message missing from the streams is not a finding: the broker is only a cache.
    pub streams: Option<&'a jetstream::Context>,
    pub history: Option<&'a History>,
}

/// Compares the databases with each other. If the first pass finds something, a second confirms it.
pub async fn audit(databases: &Databases, options: Options) -> Result<Report, DbErr> {
    audit_with(databases, options, CompareWith::default()).await
}

/// Like [`audit`], and compares the databases with further sources.
pub async fn audit_with(
    databases: &Databases,
    options: Options,
    compare_with: CompareWith<'_>,
) -> Result<Report, DbErr> {
    let first = audit_once_with(databases, options, compare_with).await?;
    if first.findings.is_empty() {
        return Ok(first);
    }
    tokio::time::sleep(options.grace).await;
    Ok(audit_once_with(databases, options, compare_with)
        .await?
        .still_standing(&first))
}

/// A single pass. On a live system, work in progress may look wrong.
pub async fn audit_once(databases: &Databases, options: Options) -> Result<Report, DbErr> {
    audit_once_with(databases, options, CompareWith::default()).await
}

async fn audit_once_with(
    databases: &Databases,
    options: Options,
    compare_with: CompareWith<'_>,
) -> Result<Report, DbErr> {
    let mut report = Report::default();
    // Orders first: the decision behind a final order was committed before the order became final,
    // so payments, read later, must have it.
    orders::check(databases, options, &mut report).await?;
    books::check(&databases.payments, &mut report).await?;
    flow::check(databases, options, &mut report).await?;
    if let Some(streams) = compare_with.streams {
        streams::check(databases, streams, &mut report).await?;
    }
    if let Some(history) = compare_with.history {
        history::check(databases, history, &mut report).await?;
    }
    report.findings.sort();
    report.findings.dedup();
    Ok(report)
}

impl Report {
    /// Keeps only the findings that `earlier` has too.
    #[must_use]
    pub fn still_standing(mut self, earlier: &Self) -> Self {
        self.findings.retain(|finding| {
            earlier
                .findings
                .iter()
                .any(|other| other.kind == finding.kind && other.id == finding.id)
        });
        self
    }

    fn add(&mut self, kind: FindingKind, id: impl fmt::Display, detail: impl Into<String>) {
        self.findings.push(Finding {
            kind,
            id: id.to_string(),
            detail: detail.into(),
        });
    }
}

impl fmt::Display for FindingKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // People and scripts see the same name.
        let name = serde_json::to_value(self).map_err(|_| fmt::Error)?;
        f.pad(name.as_str().unwrap_or_default())
    }
}

async fn rows<T: FromQueryResult>(
    db: &DatabaseConnection,
    sql: &str,
    values: Vec<Value>,
) -> Result<Vec<T>, DbErr> {
    T::find_by_statement(Statement::from_sql_and_values(
        DbBackend::Postgres,
        sql,
        values,
    ))
    .all(db)
    .await
}

/// Findings reported per kind. More are not useful.
const FINDINGS_MAX: usize = 1000;
/// Id of the extra finding that is added when the list was cut at [`FINDINGS_MAX`].
const TRUNCATED_ID: &str = "and more";

#[derive(FromQueryResult)]
struct FindingRow {
    id: String,
    detail: String,
}

/// Adds a finding for each row (`id`, `detail`) of `query`. The order is fixed, so that a second
/// pass returns the same rows. A cut list is itself a finding, which the second pass confirms.
async fn add_findings(
    db: &DatabaseConnection,
    kind: FindingKind,
    query: &str,
    report: &mut Report,
) -> Result<(), DbErr> {
    let query = format!(
        "SELECT id, detail FROM ({query}) wrong ORDER BY id LIMIT {}",
        FINDINGS_MAX + 1
    );
    let wrong: Vec<FindingRow> = rows(db, &query, Vec::new()).await?;
    if wrong.len() > FINDINGS_MAX {
        report.add(
            kind,
            TRUNCATED_ID,
            format!("only the first {FINDINGS_MAX} are listed"),
        );
    }
    for one in wrong.into_iter().take(FINDINGS_MAX) {
        report.add(kind, one.id, one.detail);
    }
    Ok(())
}

async fn count(db: &DatabaseConnection, sql: &str) -> Result<u64, DbErr> {
    let row = db
        .query_one_raw(Statement::from_string(DbBackend::Postgres, sql))
        .await?;
    let count: i64 = row
        .ok_or_else(|| DbErr::RecordNotFound(sql.to_owned()))?
        .try_get_by_index(0)?;
    Ok(count.unsigned_abs())
}
