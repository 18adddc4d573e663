//! Replay: applies a dead letter again.
//!
//! A replay needs no broker. One transaction passes the stored message to its subscriber, writes
//! the inbox row and marks the dead letter as replayed. If the event was applied meanwhile, the
//! handler recognises the repetition. A dry run rolls the same transaction back, so it cannot
//! differ from the real run.

use std::fmt;

use sea_orm::DbErr;
use sea_orm::entity::prelude::*;
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::database::Database;
use crate::dead_letters::table::{self, Verdict};
use crate::inbox::apply::{Applied, apply, as_failure, is_transient};
use crate::inbox::message::{Incoming, RawMessage};
use crate::postgres::{execute, sql};
use crate::retry::{Failure, retry};
use crate::subscriber::Subscriber;
use crate::transaction::Transaction;

/// The result of applying a dead letter again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Replay {
    /// Id of the dead letter.
    pub id: Uuid,
    /// Whether everything was rolled back.
    pub dry_run: bool,
    pub outcome: ReplayOutcome,
    /// What happened, in one sentence.
    pub detail: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ReplayOutcome {
    /// The message took effect.
    Applied,
    /// The message had already been applied.
    NothingToDo,
    /// The message still cannot be handled.
    Poison,
    /// The message still contradicts an earlier decision.
    Quarantine,
}

impl fmt::Display for ReplayOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Applied => "applied",
            Self::NothingToDo => "nothing to do",
            Self::Poison => "poison",
            Self::Quarantine => "quarantine",
        })
    }
}

/// Applies the dead letter `id` of this subscriber again; `None` if there is no such letter.
pub async fn replay<S: Subscriber>(
    db: &Database,
    subscriber: &S,
    id: Uuid,
    dry_run: bool,
) -> Result<Option<Replay>, Failure> {
    // If the answer to a COMMIT was lost, the next attempt finds that the message was applied.
    retry(|| replay_once(db, subscriber, id, dry_run)).await
}

async fn replay_once<S: Subscriber>(
    db: &Database,
    subscriber: &S,
    id: Uuid,
    dry_run: bool,
) -> Result<Option<Replay>, Failure> {
    // The row is not locked, because the consumer locks it last. The handler's own locks serialize
    // concurrent replays: the second sees the effects of the first.
    let letter = table::Entity::find_by_id(id)
        .filter(table::Column::Consumer.eq(S::SUBSCRIPTION.consumer))
        .one(db)
        .await?;
    let Some(letter) = letter else {
        return Ok(None);
    };
    let headers = letter.header_map();
    let incoming = Incoming::<S::Event>::read(RawMessage {
        subject: &letter.subject,
        headers: Some(&headers),
        payload: &letter.payload,
        stream_sequence: letter.stream_sequence,
        delivered: letter.delivered,
    });
    let txn = db.begin("replay").await?;
    let verdict = match apply(&txn, subscriber, std::slice::from_ref(&incoming)).await {
        Ok(Applied {
            effect, mut dead, ..
        }) => match (effect, dead.pop()) {
            (Some(effect), None) => {
                let detail = subscriber.describe(&effect);
                let (outcome, detail) = match detail {
                    Some(detail) => (ReplayOutcome::Applied, detail),
                    None => (
                        ReplayOutcome::NothingToDo,
                        "It was already applied.".to_owned(),
                    ),
                };
                if dry_run {
                    txn.rollback().await?;
                } else {
                    note_applied(&txn, id).await?;
                    txn.commit().await?;
                    subscriber.committed(effect);
                }
                return Ok(Some(Replay {
                    id,
                    dry_run,
                    outcome,
                    detail,
                }));
            }
            (_, Some(letter)) => letter.verdict,
            (None, None) => Verdict::Poison("the message contains no event".to_owned()),
        },
        Err(error) if is_transient(&error) => return Err(as_failure(error)),
        Err(error) => Verdict::Poison(format!("{error:#}")),
    };
    txn.rollback().await?;
    if !dry_run {
        note_refused(db, &letter, &verdict).await?;
    }
    Ok(Some(Replay {
        id,
        dry_run,
        outcome: match verdict {
            Verdict::Poison(_) => ReplayOutcome::Poison,
            Verdict::Quarantine(_) => ReplayOutcome::Quarantine,
        },
        detail: verdict.cause(),
    }))
}

async fn note_applied(txn: &Transaction, id: Uuid) -> Result<(), DbErr> {
    let update = sql(
        "UPDATE dead_letters SET replays = replays + 1, replayed_at = clock_timestamp()
         WHERE id = $1",
        [id.into()],
    );
    txn.execute(update).await?;
    Ok(())
}

/// Records a replay that was refused; the dead letter stays unresolved. The new counters are
/// computed from `letter`, so a retry counts only once.
async fn note_refused(
    db: &Database,
    letter: &table::Model,
    verdict: &Verdict,
) -> Result<(), DbErr> {
    let update = sql(
        "UPDATE dead_letters SET replays = $4 + 1, replayed_at = now(), times = $5 + 1, kind = $2,
                                 cause = $3, last_seen_at = clock_timestamp()
         WHERE id = $1",
        [
            letter.id.into(),
            verdict.kind().into(),
            verdict.cause().into(),
            letter.replays.into(),
            letter.times.into(),
        ],
    );
    execute(db, update).await?;
    Ok(())
}
