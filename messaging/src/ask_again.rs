//! Both halves of asking again: publishing a request until its answer comes, and giving a stored
//! answer again.
//!
//! Whatever the broker loses, a request that stays without an answer is published again, for ever,
//! each time under the next number. The other service answers a number that it has not answered
//! yet. Everything that decides when to ask is in the database; a process that dies forgets nothing.

use std::collections::HashSet;
use std::time::Duration;

use anyhow::Context as _;
use failpoint::{failpoint, removed};
use sea_orm::{ConnectionTrait as _, DatabaseTransaction, DbErr, FromQueryResult};
use shared_contracts::{Event, EventId};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use uuid::Uuid;

use crate::broker_loss::BrokerLoss;
use crate::database::Database;
use crate::outbox::message::Message;
use crate::outbox::table::is_behind;
use crate::postgres::{execute, now, sql, within};
use crate::transaction::Transaction;

/// How often due requests are looked for; also the second of "per second".
const INTERVAL: Duration = Duration::from_secs(1);
/// A step that hangs (a dead connection) is given up.
const STEP_TIMEOUT: Duration = Duration::from_secs(20);
/// Any number: of several replicas, the one that holds this advisory lock asks.
const ASK_AGAIN_LOCK: i64 = 7_011_988;

/// Requests that are published again until an answer comes.
pub trait Requests: Send + Sync + 'static {
    type Event: Event;

    /// Where the requests are.
    const TABLE: RequestTable;

    /// The requests of these rows, which `txn` has locked. A row that yields no request (someone
    /// edited the table) is counted as asked, and delays no other.
    fn load(
        &self,
        txn: &Transaction,
        ids: &[Uuid],
    ) -> impl Future<Output = Result<Vec<Request<Self::Event>>, DbErr>> + Send;

    /// Called once the requests are committed.
    fn asked(&self, requests: usize);
}

/// A request as a row holds it.
pub struct Request<E> {
    pub id: Uuid,
    pub event: anyhow::Result<E>,
}

/// A table with one row per request. These names are put into SQL as they are.
#[derive(Clone, Copy, Debug)]
pub struct RequestTable {
    pub name: &'static str,
    /// Condition on a row `r`: no answer has come.
    pub is_pending: &'static str,
    /// The event of the request.
    pub event_id: &'static str,
    /// Number of the newest request: 0 for the first, then 1, 2, ...
    pub asks: &'static str,
    /// When it was asked again last.
    pub asked_at: &'static str,
    /// When the row was stored, by the database's clock.
    pub stored_at: &'static str,
}

/// When a request without an answer is published again.
#[derive(Clone, Copy, Debug)]
pub struct AskPolicy {
    /// After the last request was published. Doubled with each further one.
    pub after: Duration,
    /// Never later than this.
    pub after_max: Duration,
    /// Requests per second.
    pub limit: u32,
}

/// Asks again, in one process.
pub(crate) struct AskAgain<R> {
    pub(crate) db: Database,
    pub(crate) requests: R,
    pub(crate) policy: AskPolicy,
    pub(crate) loss: BrokerLoss,
}

#[derive(FromQueryResult)]
struct Due {
    id: Uuid,
    event_id: Uuid,
    asks: i32,
}

impl<R: Requests> AskAgain<R> {
    pub(crate) async fn run(&self, shutdown: &CancellationToken) {
        let mut losses = self.loss.watch();
        let mut noted = None;
        let mut pause = INTERVAL;
        loop {
            let next = tokio::time::timeout(pause, losses.changed());
            if shutdown.run_until_cancelled(next).await.is_none() {
                return;
            }
            let latest = *losses.borrow_and_update();
            let begun = Instant::now();
            let loss = latest.filter(|_| latest > noted);
            match within(STEP_TIMEOUT, self.step(loss)).await {
                Ok(asked) => {
                    noted = latest;
                    if asked > 0 {
                        self.requests.asked(asked);
                        info!(
                            requests = asked,
                            "Requests without an answer published again"
                        );
                    }
                }
                Err(error) => warn!(
                    error = format!("{error:#}"),
                    "Requests without an answer could not be looked for; trying again"
                ),
            }
            // A step that takes long (very many requests are pending) runs less often.
            pause = INTERVAL.max(begun.elapsed() * 10);
        }
    }

    /// One step: in one transaction, the requests that are due and a new message for each.
    async fn step(&self, loss: Option<Instant>) -> anyhow::Result<usize> {
        if let Some(before) = loss.filter(|_| !removed!("reconcile.lost_at")) {
            self.note_loss(before)
                .await
                .context("that the broker lost messages could not be noted")?;
        }
        // Mostly nothing is pending.
        if !self.has_pending().await? {
            return Ok(0);
        }
        let txn = self.db.begin("reconcile").await?;
        let wait = !take_lock(&txn).await?
            || is_behind(&txn, R::Event::SUBJECT, self.policy.after).await?;
        if wait {
            txn.rollback().await?;
            return Ok(0);
        }
        let due = self.lock_due(&txn).await?;
        if due.is_empty() || removed!("reconcile.ask_again") {
            txn.rollback().await?;
            return Ok(0);
        }
        failpoint!("reconcile.after_lock")?;
        let messages = self.messages(&txn, &due).await?;
        let counted = self.count(&txn, &due).await?;
        anyhow::ensure!(
            counted == due.len() as u64,
            "requests that were locked while pending are not pending any more"
        );
        txn.enqueue(messages).await?;
        txn.commit().await?;
        Ok(due.len())
    }

    /// Notes for all replicas that what was published before may be lost, by the database's clock,
    /// like the times it is compared with.
    async fn note_loss(&self, before: Instant) -> anyhow::Result<()> {
        // The age is taken when there is a connection, after any wait for one.
        let txn = self.db.begin("note_loss").await?;
        let age = before.elapsed().as_secs_f64();
        let update = sql(
            "UPDATE reconciliation
             SET lost_at = greatest(lost_at, clock_timestamp() - make_interval(secs => $1))",
            [age.into()],
        );
        txn.execute(update).await?;
        Ok(txn.commit().await?)
    }

    async fn has_pending(&self) -> Result<bool, DbErr> {
        let RequestTable {
            name, is_pending, ..
        } = R::TABLE;
        let query = format!("SELECT 1 FROM {name} r WHERE {is_pending} LIMIT 1");
        Ok(self.db.query_one_raw(sql(&query, [])).await?.is_some())
    }

    /// Locks pending requests, the oldest first, that were published so long ago that they or their
    /// answers may be lost, or before the broker is known to have lost messages. One that still
    /// waits in the outbox is not due, whatever its age; for one that was pruned there, the time of
    /// asking counts. All by the database's clock: that of a process may be wrong by any amount.
    ///
    /// Requests too young for any of this are excluded before their outbox rows are looked up:
    /// under load there are thousands.
    async fn lock_due(&self, txn: &DatabaseTransaction) -> Result<Vec<Due>, DbErr> {
        let RequestTable {
            name,
            is_pending,
            event_id,
            asks,
            asked_at,
            stored_at,
        } = R::TABLE;
        let query = format!(
            "SELECT r.id, r.{event_id} AS event_id, r.{asks} AS asks FROM {name} r
             LEFT JOIN outbox o ON o.event_id = r.{event_id} AND o.n = r.{asks}
             CROSS JOIN reconciliation
             CROSS JOIN LATERAL
                 (SELECT coalesce(o.published_at, r.{asked_at}, r.{stored_at}) AS at) asked
             WHERE {is_pending}
               AND r.{stored_at}
                   < greatest(now() - make_interval(secs => $1), reconciliation.lost_at)
               AND (o.event_id IS NULL OR o.published_at IS NOT NULL)
               AND (asked.at < reconciliation.lost_at
                    OR asked.at < now() - make_interval(
                        secs => least($1 * power(2, least(r.{asks}, 30)), $2)))
             ORDER BY r.id LIMIT $3 FOR UPDATE OF r SKIP LOCKED"
        );
        let AskPolicy {
            after,
            after_max,
            limit,
        } = self.policy;
        Due::find_by_statement(sql(
            &query,
            [
                after.as_secs_f64().into(),
                after_max.as_secs_f64().into(),
                i64::from(limit).into(),
            ],
        ))
        .all(txn)
        .await
    }

    /// The next request of each row: the same event under the next number, so that the broker does
    /// not take it for a repetition.
    async fn messages(&self, txn: &Transaction, due: &[Due]) -> anyhow::Result<Vec<Message>> {
        let ids: Vec<Uuid> = due.iter().map(|one| one.id).collect();
        let at = now();
        let mut messages = Vec::with_capacity(due.len());
        for Request { id, event } in self.requests.load(txn, &ids).await? {
            let Some(one) = due.iter().find(|one| one.id == id) else {
                continue;
            };
            let ask = u32::try_from(one.asks)
                .unwrap_or_default()
                .saturating_add(1);
            match event {
                Ok(event) => {
                    let event_id = EventId::from(one.event_id);
                    messages.push(Message::again(event_id, ask, &event, at, None));
                }
                // Someone edited the table. The other requests go on.
                Err(error) => error!(
                    request.id = %id,
                    error = format!("{error:#}"),
                    "A request cannot be published again"
                ),
            }
        }
        Ok(messages)
    }

    async fn count(&self, txn: &DatabaseTransaction, due: &[Due]) -> Result<u64, DbErr> {
        let RequestTable {
            name,
            is_pending,
            asks,
            asked_at,
            ..
        } = R::TABLE;
        let ids: Vec<Uuid> = due.iter().map(|one| one.id).collect();
        let update = format!(
            "UPDATE {name} r SET {asks} = {asks} + 1, {asked_at} = now()
             WHERE id = ANY($1::uuid[]) AND {is_pending}"
        );
        execute(txn, sql(&update, [ids.into()])).await
    }
}

async fn take_lock(txn: &DatabaseTransaction) -> Result<bool, DbErr> {
    let lock = sql(
        "SELECT pg_try_advisory_xact_lock($1) AS held",
        [ASK_AGAIN_LOCK.into()],
    );
    let row = txn.query_one_raw(lock).await?;
    row.map_or(Ok(false), |row| row.try_get("", "held"))
}

/// A table of stored answers, one row per request. These names are put into SQL as they are.
#[derive(Clone, Copy, Debug)]
pub struct AnswerTable {
    pub name: &'static str,
    /// Primary key, a UUID.
    pub key: &'static str,
    /// Number of the newest request that was answered.
    pub last_ask: &'static str,
}

#[derive(FromQueryResult)]
struct Rearmed {
    key: Uuid,
}

/// Raises `last_ask` to these numbers, and returns the keys for which the number was new: these
/// stored answers are to be given again, with [`Message::again`].
pub async fn rearm(
    txn: &DatabaseTransaction,
    table: &AnswerTable,
    mut asks: Vec<(Uuid, i32)>,
) -> Result<HashSet<Uuid>, DbErr> {
    if asks.is_empty() || removed!("charge.re_arm") {
        return Ok(HashSet::new());
    }
    // Sorted: two workers with overlapping requests wait for each other instead of deadlocking.
    asks.sort_unstable();
    let (keys, asks): (Vec<Uuid>, Vec<i32>) = asks.into_iter().unzip();
    let AnswerTable {
        name,
        key,
        last_ask,
    } = *table;
    let update = format!(
        "WITH held AS (
             SELECT {key} AS key FROM {name} WHERE {key} = ANY($1::uuid[])
             ORDER BY {key} FOR NO KEY UPDATE)
         UPDATE {name} a SET {last_ask} = v.ask
         FROM unnest($1::uuid[], $2::integer[]) AS v (key, ask) JOIN held USING (key)
         WHERE a.{key} = v.key AND a.{last_ask} < v.ask
         RETURNING a.{key} AS key"
    );
    let rearmed = Rearmed::find_by_statement(sql(&update, [keys.into(), asks.into()]))
        .all(txn)
        .await?;
    Ok(rearmed.into_iter().map(|row| row.key).collect())
}
