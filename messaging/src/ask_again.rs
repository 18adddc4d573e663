//! Both sides of re-asking: publishing a request until its answer arrives, and publishing a stored
//! answer again.
//!
//! The broker may lose any message. A request without an answer is re-asked without limit, each
//! time under the next number. The other service answers each new number. All state that decides
//! when to re-ask is in the database, so it survives a crash.

use std::collections::HashSet;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use anyhow::Context as _;
use async_nats::jetstream::consumer;
use broker::Broker;
use failpoint::{failpoint, removed};
use futures_util::TryStreamExt as _;
use sea_orm::{ConnectionTrait as _, DbErr, FromQueryResult};
use shared_contracts::{Event, EventId};
use time::OffsetDateTime;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};
use uuid::Uuid;

use crate::broker_loss::BrokerLoss;
use crate::database::Database;
use crate::outbox::message::Message;
use crate::outbox::table::is_behind;
use crate::postgres::{execute, now, one_row, sql, within};
use crate::scan::{Pace, RECENT, id_at};
use crate::transaction::Transaction;

/// Interval between two scans for due requests.
const INTERVAL: Duration = Duration::from_secs(1);
/// Interval while more requests are due than the last step re-asked.
const BUSY_INTERVAL: Duration = Duration::from_millis(20);
/// A step that hangs, for example on a dead connection, is aborted.
const STEP_TIMEOUT: Duration = Duration::from_secs(20);
/// Short, because a transaction is open while the broker answers.
const READER_TIMEOUT: Duration = Duration::from_secs(1);
/// Key of an advisory lock (any number): only the replica that holds it re-asks.
const ASK_AGAIN_LOCK: i64 = 7_011_988;
/// Maximum number of requests per step.
const BATCH_MAX: u32 = 1000;
/// Maximum number of unread requests, if the stream has room for twice as many. So re-asks are
/// published no faster than they are read, and evict no unread request.
const UNREAD_MAX: u64 = 2000;
/// Assumed size of a request while the stream is empty.
const REQUEST_BYTES: u64 = 512;
/// Counting stops here, because it is expensive and nobody needs an exact larger number.
const COUNT_MAX: i64 = 100_000;

/// Requests that are re-asked until an answer arrives.
pub trait Requests: Send + Sync + 'static {
    type Event: Event;

    /// The table that holds the requests.
    const TABLE: RequestTable;

    /// Durable consumer of the service that answers.
    const READ_BY: &'static str;

    /// Loads the requests of these rows, which `txn` has locked. A row without a request (someone
    /// edited the table) counts as re-asked and does not delay the others.
    fn load(
        &self,
        txn: &Transaction,
        ids: &[Uuid],
    ) -> impl Future<Output = Result<Vec<Request<Self::Event>>, DbErr>> + Send;

    /// Called after the re-asks are committed.
    fn asked(&self, requests: usize);
}

/// A request as loaded from its row.
pub struct Request<E> {
    pub id: Uuid,
    pub event: anyhow::Result<E>,
}

/// A table with one row per request. These names are inserted into SQL verbatim.
#[derive(Clone, Copy, Debug)]
pub struct RequestTable {
    pub name: &'static str,
    /// SQL condition on a row `r`: it has no answer.
    pub is_pending: &'static str,
    /// Column of the request's event id.
    pub event_id: &'static str,
    /// Column of the number of the newest request: 0 for the first, then 1, 2, ...
    pub asks: &'static str,
    /// Column of the time of the last re-ask.
    pub asked_at: &'static str,
    /// Column of the time when the row was stored, by the database's clock.
    pub stored_at: &'static str,
}

/// When a request without an answer is re-asked.
#[derive(Clone, Copy, Debug)]
pub struct AskPolicy {
    /// Delay after the last publication. It doubles with each re-ask.
    pub after: Duration,
    pub after_max: Duration,
    /// Maximum number of re-asks per second. They are never published faster than they are read.
    pub limit: u32,
}

/// Requests without an answer, as found by the last scan of this process; `None` if it failed.
/// Clones share the value.
#[derive(Clone, Debug, Default)]
pub(crate) struct PendingRequests(Arc<RwLock<Option<Pending>>>);

/// Number and age of requests without an answer.
#[derive(Clone, Copy, Debug, Default, FromQueryResult)]
pub struct Pending {
    /// Counted up to 100,000.
    pub number: i64,
    /// Age of the oldest, by the database's clock.
    pub oldest_seconds: f64,
}

impl PendingRequests {
    pub(crate) fn get(&self) -> Option<Pending> {
        *self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, found: Option<Pending>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = found;
    }
}

/// Re-asks due requests, in one process.
pub(crate) struct AskAgain<R> {
    pub(crate) db: Database,
    /// For scans of the whole table, which may take long.
    pub(crate) scan_db: Database,
    pub(crate) broker: Broker,
    pub(crate) requests: R,
    pub(crate) policy: AskPolicy,
    pub(crate) loss: BrokerLoss,
    pub(crate) pending: PendingRequests,
}

#[derive(FromQueryResult)]
struct Due {
    id: Uuid,
    event_id: Uuid,
    asks: i32,
}

/// Which rows a step reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Range {
    /// Rows with a greater id than this one.
    After(Uuid),
    /// Rows that have just become old enough for their first re-ask.
    Recent,
}

/// Result of one step.
enum Step {
    /// All due requests are re-asked.
    Asked(usize),
    /// There may be more due requests with a greater id.
    More(usize, Uuid),
    /// The reader already has the maximum number of unread requests.
    ReaderIsBehind,
}

/// State that a process keeps between two steps.
struct Progress {
    range: Range,
    pace: Pace,
    scan_at: Instant,
    /// Requests that the rate limit allows now, and when that was computed.
    allowed: f64,
    since: Instant,
    /// Creation time of the reader's durable consumer.
    reader: Option<OffsetDateTime>,
}

impl<R: Requests> AskAgain<R> {
    pub(crate) async fn run(&self, shutdown: &CancellationToken) {
        let mut losses = self.loss.watch();
        let mut noted = None;
        let mut progress = Progress {
            range: Range::Recent,
            pace: Pace::default(),
            scan_at: Instant::now(),
            allowed: 0.0,
            since: Instant::now(),
            reader: None,
        };
        let mut pause = INTERVAL;
        loop {
            let next = tokio::time::timeout(pause, losses.changed());
            if shutdown.run_until_cancelled(next).await.is_none() {
                return;
            }
            let latest = *losses.borrow_and_update();
            let loss = latest.filter(|_| latest > noted);
            pause = match self.round(loss, &mut progress).await {
                Ok(pause) => {
                    noted = latest;
                    pause
                }
                Err(error) => {
                    warn!(
                        error = format!("{error:#}"),
                        "The scan for requests without an answer failed; retrying"
                    );
                    INTERVAL
                }
            };
        }
    }

    /// Re-asks due requests. Returns the time until the next round.
    async fn round(
        &self,
        loss: Option<Instant>,
        progress: &mut Progress,
    ) -> anyhow::Result<Duration> {
        if let Some(before) = loss.filter(|_| !removed!("reconcile.lost_at")) {
            within(STEP_TIMEOUT, self.note_loss(before))
                .await
                .context("the broker loss cannot be recorded")?;
            progress.scan_at = Instant::now();
        }
        let is_continued = matches!(progress.range, Range::After(id) if !id.is_nil());
        if Instant::now() >= progress.scan_at && !is_continued {
            let begun = Instant::now();
            let counted = within(progress.pace.timeout(), self.count_pending()).await;
            progress.pace.note(begun.elapsed());
            progress.scan_at = Instant::now() + progress.pace.pause();
            self.pending.set(counted.as_ref().ok().copied());
            let found = counted?;
            // Usually nothing is pending.
            if found.number == 0 {
                progress.range = Range::Recent;
                return Ok(INTERVAL);
            }
            progress.range = Range::After(Uuid::nil());
        } else if !is_continued {
            if !progress.pace.is_slow() {
                return Ok(INTERVAL);
            }
            progress.range = Range::Recent;
        }
        let limit = progress.allow(self.policy.limit);
        if limit == 0 {
            return Ok(BUSY_INTERVAL);
        }
        let (db, timeout) = match progress.range {
            Range::After(_) => (&self.scan_db, progress.pace.timeout()),
            Range::Recent => (&self.db, STEP_TIMEOUT),
        };
        let step = within(timeout, self.step(db, limit, progress)).await?;
        let (asked, range, pause) = match step {
            Step::Asked(asked) => (asked, Range::Recent, INTERVAL),
            Step::More(asked, last) => (asked, Range::After(last), BUSY_INTERVAL),
            Step::ReaderIsBehind => (0, progress.range, BUSY_INTERVAL),
        };
        progress.range = range;
        if asked > 0 {
            progress.allowed -= asked as f64;
            self.requests.asked(asked);
            info!(requests = asked, "Re-asked requests without an answer");
        }
        Ok(pause)
    }

    /// One step: locks due requests and enqueues a new message for each, in one transaction.
    async fn step(
        &self,
        db: &Database,
        limit: u32,
        progress: &mut Progress,
    ) -> anyhow::Result<Step> {
        let txn = db.begin("reconcile").await?;
        let wait = !take_lock(&txn).await?
            || is_behind(&txn, R::Event::SUBJECT, self.policy.after).await?;
        if wait {
            txn.rollback().await?;
            return Ok(Step::Asked(0));
        }
        let mut due = self.lock_due(&txn, progress.range, limit).await?;
        if due.is_empty() || removed!("reconcile.ask_again") {
            txn.rollback().await?;
            return Ok(Step::Asked(0));
        }
        let is_full = due.len() == limit as usize;
        let room = self.room(progress).await;
        if room == 0 {
            txn.rollback().await?;
            return Ok(Step::ReaderIsBehind);
        }
        due.truncate(usize::try_from(room).unwrap_or(usize::MAX));
        failpoint!("reconcile.after_lock")?;
        let messages = self.messages(&txn, &due).await?;
        let counted = self.count(&txn, &due).await?;
        anyhow::ensure!(
            counted == due.len() as u64,
            "locked requests are no longer pending"
        );
        txn.enqueue(messages).await?;
        txn.commit().await?;
        Ok(match due.last() {
            Some(last) if is_full || due.len() as u64 == room => Step::More(due.len(), last.id),
            _ => Step::Asked(due.len()),
        })
    }

    /// How many requests may be published to the reader now. If its durable does not exist yet, it
    /// will begin with what the stream holds then.
    async fn room(&self, progress: &mut Progress) -> u64 {
        let found = tokio::time::timeout(READER_TIMEOUT, self.reader()).await;
        match found.unwrap_or_else(|_| Err(anyhow::anyhow!("no answer"))) {
            Ok((Some(reader), unread_max)) => {
                if progress.reader.is_some_and(|known| known != reader.created) {
                    // A new durable may have skipped unread requests.
                    self.loss.note(Instant::now());
                }
                progress.reader = Some(reader.created);
                let unread = reader.num_pending + reader.num_ack_pending as u64;
                unread_max.saturating_sub(unread)
            }
            Ok((None, unread_max)) => unread_max,
            Err(error) => {
                debug!(
                    error = format!("{error:#}"),
                    "The state of the reader of requests is unknown"
                );
                0
            }
        }
    }

    /// The reader's durable, if it exists, and the maximum number of unread requests.
    async fn reader(&self) -> anyhow::Result<(Option<consumer::Info>, u64)> {
        let jetstream = self.broker.jetstream();
        let stream = jetstream.get_stream(R::Event::STREAM).await?;
        let info = stream.cached_info();
        let size = info.state.bytes.checked_div(info.state.messages);
        let size = size.unwrap_or(REQUEST_BYTES).max(1);
        let unread_max = match u64::try_from(info.config.max_bytes) {
            Ok(max_bytes) => UNREAD_MAX.min(max_bytes / size / 2),
            // The stream has no limit.
            Err(_) => UNREAD_MAX,
        };
        let mut consumers = stream.consumers();
        while let Some(found) = consumers.try_next().await? {
            if found.name == R::READ_BY {
                return Ok((Some(found), unread_max));
            }
        }
        Ok((None, unread_max))
    }

    async fn count_pending(&self) -> Result<Pending, DbErr> {
        let RequestTable {
            name,
            is_pending,
            stored_at,
            ..
        } = R::TABLE;
        let query = format!(
            "SELECT count(*) AS number,
                    coalesce(extract(epoch FROM clock_timestamp() - min(stored_at)), 0)::float8
                        AS oldest_seconds
             FROM (SELECT r.{stored_at} AS stored_at FROM {name} r WHERE {is_pending}
                   ORDER BY r.id LIMIT $1) AS pending"
        );
        one_row(&self.scan_db, sql(&query, [COUNT_MAX.into()])).await
    }

    /// Records for all replicas that messages published before this time may be lost. Uses the
    /// database's clock, like the times it is compared with.
    async fn note_loss(&self, before: Instant) -> anyhow::Result<()> {
        // The age is computed after the transaction has begun, because waiting for a connection
        // takes time.
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

    /// Locks due requests, the oldest first. A pending request is due if its delay after
    /// publication has passed, or if it was published before a known broker loss. A request that is
    /// still pending in the outbox is not due, whatever its age. If the outbox row was pruned, the
    /// time of the last request counts. Only the database's clock decides: the clock of a process
    /// may be wrong by any amount.
    ///
    /// Requests that are too young are excluded before their outbox rows are read: under load there
    /// are thousands.
    async fn lock_due(
        &self,
        txn: &Transaction,
        range: Range,
        limit: u32,
    ) -> Result<Vec<Due>, DbErr> {
        let RequestTable {
            name,
            is_pending,
            event_id,
            asks,
            asked_at,
            stored_at,
        } = R::TABLE;
        let (from, range) = match range {
            Range::After(id) => (id, "true".to_owned()),
            Range::Recent => (
                Uuid::nil(),
                format!(
                    "r.id >= {} AND r.id < {}",
                    id_at("now() - make_interval(secs => $1 + $5)"),
                    id_at("now() - make_interval(secs => $1)")
                ),
            ),
        };
        let query = format!(
            "SELECT r.id, r.{event_id} AS event_id, r.{asks} AS asks FROM {name} r
             LEFT JOIN outbox o ON o.event_id = r.{event_id} AND o.n = r.{asks}
             CROSS JOIN reconciliation
             CROSS JOIN LATERAL
                 (SELECT coalesce(o.published_at, r.{asked_at}, r.{stored_at}) AS at) asked
             WHERE {is_pending} AND r.id > $4 AND $5::float8 > 0 AND {range}
               AND r.{stored_at}
                   < greatest(now() - make_interval(secs => $1), reconciliation.lost_at)
               AND (o.event_id IS NULL OR o.published_at IS NOT NULL)
               AND (asked.at < reconciliation.lost_at
                    OR asked.at < now() - make_interval(
                        secs => least($1 * power(2, least(r.{asks}, 30)), $2)))
             ORDER BY r.id LIMIT $3 FOR UPDATE OF r SKIP LOCKED"
        );
        let AskPolicy {
            after, after_max, ..
        } = self.policy;
        Due::find_by_statement(sql(
            &query,
            [
                after.as_secs_f64().into(),
                after_max.as_secs_f64().into(),
                i64::from(limit).into(),
                from.into(),
                RECENT.as_secs_f64().into(),
            ],
        ))
        .all(txn)
        .await
    }

    /// Builds the next request of each row: the same event under the next number, so that the
    /// broker does not drop it as a duplicate.
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
                // Someone edited the table. The other requests are not affected.
                Err(error) => error!(
                    request.id = %id,
                    error = format!("{error:#}"),
                    "A request cannot be re-asked"
                ),
            }
        }
        Ok(messages)
    }

    async fn count(&self, txn: &Transaction, due: &[Due]) -> Result<u64, DbErr> {
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

impl Progress {
    /// How many requests the rate limit allows now.
    fn allow(&mut self, per_second: u32) -> u32 {
        let per_second = f64::from(per_second);
        self.allowed += per_second * self.since.elapsed().as_secs_f64();
        self.allowed = self.allowed.clamp(0.0, per_second);
        self.since = Instant::now();
        // Not negative, and at most the setting.
        (self.allowed as u32).min(BATCH_MAX)
    }
}

async fn take_lock(txn: &Transaction) -> Result<bool, DbErr> {
    let lock = sql(
        "SELECT pg_try_advisory_xact_lock($1) AS held",
        [ASK_AGAIN_LOCK.into()],
    );
    let row = txn.query_one_raw(lock).await?;
    row.map_or(Ok(false), |row| row.try_get("", "held"))
}

/// A table of stored answers, one row per request. These names are inserted into SQL verbatim.
#[derive(Clone, Copy, Debug)]
pub struct AnswerTable {
    pub name: &'static str,
    /// Column of the primary key, a UUID.
    pub key: &'static str,
    /// Column of the number of the newest answered request.
    pub last_ask: &'static str,
}

#[derive(FromQueryResult)]
struct Rearmed {
    key: Uuid,
}

/// Raises `last_ask` to these numbers and returns the keys whose number is new. The caller
/// publishes the stored answers of these keys again, with [`Message::again`].
pub async fn rearm(
    txn: &Transaction,
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
