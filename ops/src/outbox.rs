//! The outboxes: what waits to be published, and publishing old rows again.

use std::time::Duration;

use messaging::{Backlog, Resend};
use serde::Serialize;
use time::OffsetDateTime;

use crate::audit::Databases;

/// How an outbox is.
#[derive(Clone, Debug, Serialize)]
pub struct OutboxStatus {
    /// Whose.
    pub service: &'static str,
    /// Rows that wait.
    pub pending: i64,
    /// How long the oldest has waited.
    pub oldest_seconds: f64,
    /// Most tries that a waiting row has had.
    pub attempts_max: i32,
}

/// Both outboxes.
pub async fn status(databases: &Databases) -> anyhow::Result<Vec<OutboxStatus>> {
    let mut outboxes = Vec::new();
    for (service, db) in [
        ("orders", &databases.orders),
        ("payments", &databases.payments),
    ] {
        let backlog = Backlog::read(db).await?;
        outboxes.push(OutboxStatus {
            service,
            pending: backlog.outbox_pending,
            oldest_seconds: backlog.outbox_oldest_seconds,
            attempts_max: backlog.outbox_attempts_max,
        });
    }
    Ok(outboxes)
}

/// How many messages of a service are published again.
#[derive(Clone, Debug, Serialize)]
pub struct Resent {
    /// Whose.
    pub service: &'static str,
    /// How many.
    pub messages: u64,
    /// Those of them that were published so lately that the broker takes them for repetitions, and stores nothing, if it
    /// still remembers them.
    pub recent: u64,
}

/// Has what both services published since a time published again; with `dry_run`, only counts it.
pub async fn resend(
    databases: &Databases,
    since: OffsetDateTime,
    subject: Option<&str>,
    dry_run: bool,
    duplicate_window: Duration,
) -> anyhow::Result<Vec<Resent>> {
    let mut resent = Vec::new();
    for (service, db) in [
        ("orders", &databases.orders),
        ("payments", &databases.payments),
    ] {
        let resend = Resend { since, subject };
        let recent = resend.count_remembered(db, duplicate_window).await?;
        let messages = match dry_run {
            true => resend.count(db).await?,
            false => resend.run(db).await?,
        };
        resent.push(Resent {
            service,
            messages,
            recent,
        });
    }
    Ok(resent)
}
