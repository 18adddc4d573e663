//! The outboxes: pending rows, and publishing old rows again.

use std::time::Duration;

use messaging::{Backlog, Resend};
use serde::Serialize;
use time::OffsetDateTime;

use crate::audit::Databases;

/// The unpublished rows of a service.
#[derive(Clone, Debug, Serialize)]
pub struct OutboxStatus {
    pub service: &'static str,
    pub pending: i64,
    /// Age of the oldest unpublished row.
    pub oldest_seconds: f64,
    /// Largest number of publish attempts of an unpublished row.
    pub attempts_max: i32,
}

pub async fn status(databases: &Databases) -> anyhow::Result<Vec<OutboxStatus>> {
    let mut outboxes = Vec::new();
    for (service, db) in [
        ("orders", &databases.orders),
        ("payments", &databases.payments),
    ] {
        let backlog = Backlog::read(db).await?.outbox;
        outboxes.push(OutboxStatus {
            service,
            pending: backlog.outbox_pending,
            oldest_seconds: backlog.outbox_oldest_seconds,
            attempts_max: backlog.outbox_attempts_max,
        });
    }
    Ok(outboxes)
}

/// Numbers of messages that a service publishes again.
#[derive(Clone, Debug, Serialize)]
pub struct Resent {
    pub service: &'static str,
    pub messages: u64,
    /// Messages that were first published within the duplicate window: the broker may drop them as
    /// duplicates.
    pub recent: u64,
}

/// Makes the relays of both services publish again what they have published since `since`. With
/// `dry_run`, only counts.
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
