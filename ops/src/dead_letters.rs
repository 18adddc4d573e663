//! Dead letters of both services: list, replay, drop.

use std::ops::Deref;

use anyhow::Context as _;
use messaging::{Database, DeadLetter, Replay, replay as replay_in};
use orders::Settle;
use payments::Charge;
use sea_orm::DatabaseConnection;
use serde::Serialize;
use uuid::Uuid;

use crate::audit::Databases;

/// Dead letters per query.
const PAGE: u64 = 1000;

/// A dead letter and the service that owns it.
#[derive(Clone, Debug, Serialize)]
pub struct ServiceDeadLetter {
    pub service: &'static str,
    #[serde(flatten)]
    letter: DeadLetter,
}

impl Deref for ServiceDeadLetter {
    type Target = DeadLetter;

    fn deref(&self) -> &DeadLetter {
        &self.letter
    }
}

/// All dead letters, newest first, those of orders before those of payments.
pub async fn list(databases: &Databases) -> anyhow::Result<Vec<ServiceDeadLetter>> {
    let mut letters = Vec::new();
    for (service, db) in services(databases) {
        let mut before = None;
        loop {
            let page = DeadLetter::page(db, before, PAGE).await?;
            before = page.last().map(|letter| letter.id);
            letters.extend(
                page.into_iter()
                    .map(|letter| ServiceDeadLetter { service, letter }),
            );
            if before.is_none() {
                break;
            }
        }
    }
    Ok(letters)
}

pub async fn find(databases: &Databases, id: Uuid) -> anyhow::Result<ServiceDeadLetter> {
    for (service, db) in services(databases) {
        if let Some(letter) = DeadLetter::find(db, id).await? {
            return Ok(ServiceDeadLetter { service, letter });
        }
    }
    anyhow::bail!("there is no dead letter {id}: gozon dlq ls lists them")
}

/// Applies a dead letter again in the database of its service. The service need not run; its relay
/// publishes later what the replay enqueues. With `dry_run` the transaction is rolled back.
pub async fn replay(
    databases: &Databases,
    letter: &ServiceDeadLetter,
    dry_run: bool,
) -> anyhow::Result<Replay> {
    let id = letter.id;
    let replay = match letter.service {
        "orders" => {
            let db = Database::from(databases.orders.clone());
            replay_in(&db, &Settle::default(), id, dry_run).await
        }
        _ => {
            let db = Database::from(databases.payments.clone());
            replay_in(&db, &Charge, id, dry_run).await
        }
    };
    replay
        .with_context(|| format!("dead letter {id} could not be applied"))?
        .with_context(|| {
            format!("dead letter {id} was dropped, or this version does not know its consumer")
        })
}

pub async fn remove(databases: &Databases, letter: &ServiceDeadLetter) -> anyhow::Result<()> {
    let (_, db) = services(databases)
        .into_iter()
        .find(|(service, _)| *service == letter.service)
        .context("unknown service")?;
    DeadLetter::delete(db, letter.id).await?;
    Ok(())
}

fn services(databases: &Databases) -> [(&'static str, &DatabaseConnection); 2] {
    [
        ("orders", &databases.orders),
        ("payments", &databases.payments),
    ]
}
