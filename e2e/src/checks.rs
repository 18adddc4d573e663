//! Checks at the end of a run: nothing is in progress, and the audit finds nothing.

use std::time::Duration;

use ops::audit::{self, CompareWith, Databases, Report};
use ops::history::History;
use sea_orm::{ConnectionTrait as _, DatabaseConnection, DbBackend, Statement};
use stack::System;
use tokio::time::Instant;

use crate::broker::operator;

const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Connects to both databases as superuser.
pub async fn databases(system: &System) -> anyhow::Result<Databases> {
    let postgres = system.postgres();
    Ok(Databases {
        orders: postgres.connect("orders").await?,
        payments: postgres.connect("payments").await?,
    })
}

/// Waits until no order is NEW and no outbox row is unpublished. Returns false if that is not so at
/// the deadline.
pub async fn until_settled(databases: &Databases, deadline: Instant) -> anyhow::Result<bool> {
    let unpublished = "SELECT 1 FROM outbox WHERE published_at IS NULL LIMIT 1";
    loop {
        let open = any(
            &databases.orders,
            "SELECT 1 FROM orders WHERE status = 'NEW' LIMIT 1",
        )
        .await?
            || any(&databases.orders, unpublished).await?
            || any(&databases.payments, unpublished).await?;
        if !open || Instant::now() > deadline {
            return Ok(!open);
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

async fn any(db: &DatabaseConnection, query: &str) -> anyhow::Result<bool> {
    Ok(db
        .query_one_raw(Statement::from_string(DbBackend::Postgres, query))
        .await?
        .is_some())
}

/// Audits a system in which everything is final: nothing may be late or in progress. Also compares
/// the databases with the streams and, if given, with the clients' history.
pub async fn audit_settled(
    system: &System,
    databases: &Databases,
    grace: Duration,
    history: Option<&History>,
) -> anyhow::Result<Report> {
    let options = audit::Options {
        grace,
        late_after: Duration::ZERO,
        stuck_after: Duration::ZERO,
    };
    let broker = operator(system).await?;
    let compare_with = CompareWith {
        streams: Some(broker.jetstream()),
        history,
    };
    Ok(audit::audit_with(databases, options, compare_with).await?)
}
