//! Checks the promise on real data: orders, decisions, transfers, balances, outboxes, inboxes and dead letters of both
//! databases, against each other, against what the streams say, and against what a client was told.
//!
//! It runs on a live system without locking it. The databases are read one after the other, so what is under way summaries
//! wrong for a moment; therefore a finding counts only if it still stands when everything is read again after a grace.

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

/// What is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FindingKind {
    /// FINISHED, but no decision or debit stands behind it (I2).
    FinishedWithoutDebit,
    /// CANCELLED, but debited (I2).
    CancelledButDebited,
    /// Debited more than once (I1).
    DoubledDebit,
    /// Final in a way that its decision does not say (I2).
    StatusDisagrees,
    /// Order and decision, or decision and debit, name another user or amount (I2).
    Divergent,
    /// A decision without its debit, or a debit without its decision (I2, I3).
    Unmatched,
    /// A decision or a debit for an order that nobody placed, or what the client of a history did not ask for (I8).
    Unexpected,
    /// NEW for longer than healing takes (I7).
    Stuck,
    /// NEW, and its message waits for a person (I7).
    Quarantined,
    /// The balance is not what the transfers make it (I3).
    BalanceDrift,
    /// A balance below zero, there or read (I4).
    NegativeBalance,
    /// The entries of a statement do not follow each other (I3).
    BrokenStatement,
    /// A transfer of no known shape (I3).
    MalformedTransfer,
    /// One idempotency key made two things, or was twice said to be done now (I5, I9).
    DoubledKey,
    /// A fact that should have been enqueued and was not.
    MissingEvent,
    /// A message about an order was taken, and nothing came of it (I7).
    NotApplied,
    /// A fact that waits for too long to be published.
    LatePublication,
    /// A message that was not applied and waits for a person.
    DeadLetter,
    /// A message in a stream says about an order what the databases do not (I2, I8).
    FalseMessage,
    /// A message in a stream that is none of the events about its order (I8).
    ForeignMessage,
    /// A message in a stream that cannot be read, and that nobody has set aside.
    UnreadableMessage,
    /// Answered with 2xx, and not there (I5).
    Lost,
    /// The answers to one key are not the same, byte for byte (I9).
    AnswersDiffer,
    /// Said not to be done, and done (I9).
    DeniedButDone,
    /// Refused as other content under its key, and it was the same (I9).
    RepetitionRefused,
    /// Other content under a key was applied (I10).
    OtherContentApplied,
    /// A final order was seen in another state later (I6).
    StatusBackwards,
}

/// Something that is wrong, with what it is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Finding {
    /// What is wrong.
    pub kind: FindingKind,
    /// The order, user, transfer, event or dead letter it is about.
    pub id: String,
    /// What was found, in words.
    pub detail: String,
}

/// How an audit ended.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Orders looked at.
    pub orders: u64,
    /// Of these, by status.
    pub by_status: BTreeMap<String, u64>,
    /// Decisions looked at.
    pub decisions: u64,
    /// Transfers looked at.
    pub transfers: u64,
    /// Accounts looked at.
    pub accounts: u64,
    /// Messages in the streams looked at.
    pub messages: u64,
    /// What was wanted and could not be looked at, and why.
    pub not_looked_at: Vec<String>,
    /// Exchanges of the history looked at.
    pub exchanges: u64,
    /// Everything that is wrong.
    pub findings: Vec<Finding>,
}

/// How to look.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// A finding counts only if it still stands after this long.
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
            // The longest time between two asks, and some more for the answer.
            stuck_after: Duration::from_secs(11 * 60),
            late_after: Duration::from_secs(60),
        }
    }
}

/// Both databases.
#[derive(Clone, Debug)]
pub struct Databases {
    /// Of orders.
    pub orders: DatabaseConnection,
    /// Of payments.
    pub payments: DatabaseConnection,
}

/// What the databases are compared with, beside each other.
#[derive(Clone, Copy, Default)]
pub struct CompareWith<'a> {
    /// The streams, where the broker is there to be asked. What is missing there is no finding: the broker is a cache.
    pub streams: Option<&'a jetstream::Context>,
    /// What a client was told.
    pub history: Option<&'a History>,
}

/// Looks at both databases; twice, if the first look finds something.
pub async fn audit(databases: &Databases, options: Options) -> Result<Report, DbErr> {
    audit_with(databases, options, CompareWith::default()).await
}

/// The same, also against what is beside them.
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

/// Looks at both databases once. On a live system, what is under way may look wrong.
pub async fn audit_once(databases: &Databases, options: Options) -> Result<Report, DbErr> {
    audit_once_with(databases, options, CompareWith::default()).await
}

async fn audit_once_with(
    databases: &Databases,
    options: Options,
    compare_with: CompareWith<'_>,
) -> Result<Report, DbErr> {
    let mut report = Report::default();
    // Orders before payments: whatever an order shows was decided before.
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
    /// This report with only the findings that an earlier one had too.
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
        // One name for people and for scripts.
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

/// More than this many of one kind help nobody.
const FINDINGS_MAX: usize = 1000;
/// The id of the finding that says that there are more.
const TRUNCATED_ID: &str = "and more";

#[derive(FromQueryResult)]
struct FindingRow {
    id: String,
    detail: String,
}

/// Reports what `query` names: `id` and `detail` of what is wrong. In a fixed order, so that a second look sees the same
/// ones; and that there are more is a finding itself, which a second look cannot miss.
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
            format!("only the first {FINDINGS_MAX} are named"),
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
