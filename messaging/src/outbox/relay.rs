//! Publishes outbox rows and marks exactly those that the broker acknowledged. It handles rows and
//! subjects and knows no event types.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use broker::{Backoff, Broker};
use failpoint::failpoint;
use metrics::{counter, histogram};
use sea_orm::ConnectionTrait;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};
use uuid::Uuid;

use crate::backlog::{OutboxBacklog, OutboxBacklogWatch};
use crate::database::Database;
use crate::health::HealthStatus;
use crate::metrics::{PUBLISH_SECONDS, PUBLISHED};
use crate::outbox::hand_off::HandOff;
use crate::outbox::marks::Marks;
use crate::outbox::publish::{self, Sent};
use crate::outbox::schedule::{BATCH_MAX, Schedule, Step};
use crate::outbox::stream_watch::StreamWatch;
use crate::outbox::table::{self, Acknowledged, Pending, Which};
use crate::postgres::within;
use crate::scan::Pace;
use crate::transaction::Transaction;

/// A step that hangs, for example on a dead connection, is aborted, and the database releases its
/// row locks. The step waits for up to two answers of the broker, each with its own timeout.
const STEP_TIMEOUT: Duration = Duration::from_secs(20);
/// Interval between two polls of recent rows while scans are slow.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// On a new connection, publishing waits at most this long for the check of the streams.
const FIRST_CHECK_TIMEOUT: Duration = Duration::from_secs(2);
/// Initial pause of a lane after a batch of which nothing was published.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Lane {
    /// Also polls recent rows while scans are slow.
    First,
    Second,
}

/// Why the scan task woke up.
enum Wake {
    Due,
    Failed,
    Reconnected,
}

/// Publishes the outbox rows of one database. Several relays may run on one table.
pub(crate) struct Relay {
    pub(crate) db: Database,
    /// For scans of the whole table, which may be slow.
    pub(crate) scan_db: Database,
    pub(crate) broker: Broker,
    /// Rows that were just committed in this process.
    pub(crate) hand_off: HandOff,
    pub(crate) streams: StreamWatch,
    pub(crate) backlog: OutboxBacklogWatch,
    pub(crate) marks: Marks,
    pub(crate) health: HealthStatus,
    /// Whether the last scan was slow.
    pub(crate) scans_are_slow: AtomicBool,
    /// Signals that rows were not published and need a retry.
    pub(crate) failed: Notify,
}

impl Relay {
    /// Publishes until `shutdown`. A batch in progress is finished; only waits are interrupted.
    ///
    /// Two lanes publish handed-off rows: one sends the next rows while the other waits for
    /// PubAcks. Another task marks what they have published. A further one finds the other rows:
    /// those handed off to a process that died, and those that the broker did not accept. It may be
    /// slow and never delays the lanes.
    pub(crate) async fn run(self, shutdown: CancellationToken) {
        let relay = Arc::new(self);
        let mut lanes = JoinSet::new();
        let mut others = JoinSet::new();
        for lane in [Lane::First, Lane::Second] {
            let (relay, shutdown) = (relay.clone(), shutdown.clone());
            lanes.spawn(async move { relay.run_lane(lane, &shutdown).await });
        }
        let (one, token) = (relay.clone(), shutdown.clone());
        others.spawn(async move { one.streams.run(&token).await });
        let (one, token) = (relay.clone(), shutdown.clone());
        others.spawn(async move { one.run_scans(&token).await });
        let (one, token) = (relay.clone(), shutdown.clone());
        others.spawn(async move { one.run_marks(&token).await });
        lanes.join_all().await;
        others.join_all().await;
        relay.mark().await;
    }

    /// Marks rows that the lanes have published.
    async fn run_marks(&self, shutdown: &CancellationToken) {
        let mut backoff = Backoff::new(PAUSE_MIN, PAUSE_MAX);
        let mut marked_at = Instant::now();
        while shutdown
            .run_until_cancelled(self.marks.due(marked_at))
            .await
            .is_some()
        {
            marked_at = Instant::now();
            if self.mark().await {
                backoff.reset();
            } else {
                let pause = tokio::time::sleep(backoff.pause());
                shutdown.run_until_cancelled(pause).await;
            }
        }
    }

    /// Returns false if the database does not answer. The rows are kept then.
    async fn mark(&self) -> bool {
        let rows = self.marks.take();
        if rows.is_empty() {
            return true;
        }
        let marking = async {
            self.mark_sent(&self.db, &rows, &[]).await?;
            anyhow::Ok(Step::default())
        };
        let is_marked = self.note(within(STEP_TIMEOUT, marking).await).is_some();
        if is_marked {
            // Nothing to roll back if it fails.
            let _ = failpoint!("relay.after_mark");
        } else {
            self.marks.add(rows);
        }
        is_marked
    }

    async fn run_lane(&self, lane: Lane, shutdown: &CancellationToken) {
        let mut backoff = Backoff::new(PAUSE_MIN, PAUSE_MAX);
        let mut poll_at = Instant::now() + POLL_INTERVAL;
        let mut connection_number = 0;
        while !shutdown.is_cancelled() {
            if !self.is_connected(&mut connection_number, shutdown).await {
                continue;
            }
            let rows = self.hand_off.take(BATCH_MAX as usize);
            if !rows.is_empty() {
                let done = within(STEP_TIMEOUT, self.publish_handed_off(&rows)).await;
                let step = self.note(done);
                if step.is_some_and(|step| step.failed > 0) {
                    self.failed.notify_one();
                }
                match step {
                    Some(step) if step.published > 0 => backoff.reset(),
                    // Nothing was published, so the cause is not a few bad rows.
                    _ => {
                        let pause = tokio::time::sleep(backoff.pause());
                        shutdown.run_until_cancelled(pause).await;
                    }
                }
            }
            if Instant::now() >= poll_at {
                poll_at = Instant::now() + POLL_INTERVAL;
                // While scans are fast, they also find recent rows.
                if lane == Lane::First && self.scans_are_slow.load(Ordering::Relaxed) {
                    let polled = self.publish_polled(&self.db, Which::Recent);
                    let polled = within(STEP_TIMEOUT, polled).await;
                    if self.note(polled).is_some_and(|step| step.is_full()) {
                        poll_at = Instant::now();
                    }
                }
            } else if rows.is_empty() {
                let arrived = tokio::time::timeout_at(poll_at, self.hand_off.arrived());
                shutdown.run_until_cancelled(arrived).await;
            }
        }
    }

    async fn run_scans(&self, shutdown: &CancellationToken) {
        let mut schedule = Schedule::new(Instant::now());
        let mut pace = Pace::default();
        let mut connection_number = 0;
        while !shutdown.is_cancelled() {
            let wait = async {
                tokio::select! {
                    biased;
                    () = self.broker.until_reconnected(connection_number) => Wake::Reconnected,
                    () = self.failed.notified() => Wake::Failed,
                    () = tokio::time::sleep_until(schedule.next_at()) => Wake::Due,
                }
            };
            match shutdown.run_until_cancelled(wait).await {
                None => return,
                Some(Wake::Due) => {}
                Some(Wake::Failed) => {
                    schedule.failed(Instant::now());
                    continue;
                }
                Some(Wake::Reconnected) => {
                    if self.is_connected(&mut connection_number, shutdown).await {
                        schedule.start_over(Instant::now());
                    }
                    continue;
                }
            }
            let begun = Instant::now();
            let counted = OutboxBacklog::read(&self.scan_db);
            let pending = match within(pace.timeout(), counted).await {
                Ok(found) => {
                    pace.note(begun.elapsed());
                    let pending = found.outbox_pending;
                    self.backlog.set(Some(found));
                    pending
                }
                Err(error) => {
                    pace.note(begun.elapsed());
                    self.backlog.set(None);
                    self.health.bad(&error);
                    schedule.interrupted(Instant::now());
                    continue;
                }
            };
            self.scans_are_slow.store(pace.is_slow(), Ordering::Relaxed);
            if !self.broker.is_connected() {
                self.health
                    .bad("the broker is away; committed events stay pending in the outbox");
                schedule.nothing_pending(pace.pause(), Instant::now());
                connection_number = 0;
            } else if pending == 0 {
                self.health.good();
                schedule.nothing_pending(pace.pause(), Instant::now());
            } else {
                self.scan(&mut schedule, pace, shutdown).await;
            }
        }
    }

    /// Publishes all rows that are due.
    async fn scan(&self, schedule: &mut Schedule, pace: Pace, shutdown: &CancellationToken) {
        while !shutdown.is_cancelled() {
            let Some(which) = schedule.due(Instant::now()) else {
                return;
            };
            let polled = self.publish_polled(&self.scan_db, which);
            let done = within(pace.timeout(), polled).await;
            match self.note(done) {
                None => return schedule.interrupted(Instant::now()),
                Some(step) if step.failed > 0 => {
                    schedule.failed(Instant::now());
                    if step.published == 0 && which != Which::Tried {
                        // Nothing was published, so the cause is not a few bad rows.
                        return schedule.interrupted(Instant::now());
                    }
                }
                Some(step) => {
                    if which == Which::Tried {
                        self.health.good();
                    }
                    schedule.done(which, step, pace.pause(), Instant::now());
                }
            }
        }
    }

    /// Waits for a connection to the broker and, on a new connection, for the check of the streams.
    /// Returns false if there is no connection yet.
    async fn is_connected(
        &self,
        connection_number: &mut u64,
        shutdown: &CancellationToken,
    ) -> bool {
        if !self.broker.is_connected() {
            self.health
                .bad("the broker is away; committed events stay pending in the outbox");
            shutdown
                .run_until_cancelled(self.broker.until_connected())
                .await;
            return false;
        }
        if *connection_number != self.broker.connection_number() {
            *connection_number = self.broker.connection_number();
            let checked = self.streams.until_checked(*connection_number);
            let checked = tokio::time::timeout(FIRST_CHECK_TIMEOUT, checked);
            // Continue even if a stream cannot be created: publishing reports it, and other streams
            // may exist.
            let _ = shutdown.run_until_cancelled(checked).await;
        }
        true
    }

    /// Records the result of a step. `None` if it failed as a whole.
    fn note(&self, done: anyhow::Result<Step>) -> Option<Step> {
        match done {
            Ok(step) => {
                if step.failed > 0 {
                    self.health
                        .bad(format!("{} messages could not be published", step.failed));
                }
                if step.stream_missing {
                    self.streams.check.notify_one();
                }
                Some(step)
            }
            Err(error) => {
                if self.health.bad(format!("{error:#}")) {
                    warn!(error = format!("{error:#}"), "Publishing failed; retrying");
                }
                None
            }
        }
    }

    /// One step: locks a batch of pending rows, publishes them, and marks those whose PubAck came.
    ///
    /// The transaction stays open while the broker answers, because it holds the rows' locks:
    /// another relay skips them (SKIP LOCKED), so only one relay processes a row, without leases or
    /// clocks. Almost nothing else needs these locks, and the broker's answer has a timeout. If
    /// this process dies, the server releases the locks, and the next relay publishes the rows
    /// again under the same message id.
    async fn publish_polled(&self, db: &Database, which: Which) -> anyhow::Result<Step> {
        let txn = db
            .begin("relay")
            .await
            .context("the outbox cannot be read")?;
        let rows = table::lock_pending(&txn, which, BATCH_MAX)
            .await
            .context("the outbox cannot be read")?;
        if rows.is_empty() {
            txn.rollback().await.context("the outbox cannot be read")?;
            return Ok(Step::default());
        }
        let step = self.publish(&txn, &rows).await?;
        txn.commit()
            .await
            .context("published rows cannot be marked")?;
        Ok(step)
    }

    /// The same for handed-off rows. They are not locked, because relays do not poll rows that are
    /// so young, and they are marked later. If this process dies, a relay finds and publishes them
    /// again under the same message id.
    async fn publish_handed_off(&self, rows: &[Pending]) -> anyhow::Result<Step> {
        let (step, sent) = self.send(rows).await?;
        self.marks.add(sent.acknowledged);
        self.mark_sent(&self.db, &[], &sent.unacknowledged).await?;
        Ok(step)
    }

    async fn publish(&self, txn: &Transaction, rows: &[Pending]) -> anyhow::Result<Step> {
        let (step, sent) = self.send(rows).await?;
        self.mark_sent(txn, &sent.acknowledged, &sent.unacknowledged)
            .await?;
        Ok(step)
    }

    async fn send(&self, rows: &[Pending]) -> anyhow::Result<(Step, Sent)> {
        failpoint!("relay.after_take")?;
        let begun = Instant::now();
        let sent = publish::publish(&self.broker, rows).await?;
        histogram!(PUBLISH_SECONDS).record(begun.elapsed());
        failpoint!("relay.after_puback")?;

        let (published, failed) = (sent.acknowledged.len(), sent.unacknowledged.len());
        counter!(PUBLISHED, "result" => "acknowledged").increment(published as u64);
        counter!(PUBLISHED, "result" => "failed").increment(failed as u64);
        match &sent.error {
            None => debug!(published, "Outbox rows published"),
            Some(error) => {
                warn!(published, failed, error = %error, "Some outbox rows were not published; they stay pending");
            }
        }
        let step = Step {
            published,
            failed,
            stream_missing: sent.stream_missing,
            newest: rows.last().map(|row| row.event_id),
        };
        Ok((step, sent))
    }

    /// Marks rows whose PubAck came, and counts an attempt for the others.
    ///
    /// After a reconnect, the broker may have lost the messages that it acknowledged before. A row
    /// marked now would look as if it was published after the loss, so it counts as not
    /// acknowledged.
    async fn mark_sent(
        &self,
        db: &impl ConnectionTrait,
        acknowledged: &[Acknowledged],
        unacknowledged: &[(Uuid, i32)],
    ) -> anyhow::Result<()> {
        let connection_number = self.broker.connection_number();
        let (known, doubtful): (Vec<Acknowledged>, Vec<Acknowledged>) = acknowledged
            .iter()
            .partition(|row| row.connection_number == connection_number);
        if !doubtful.is_empty() {
            self.failed.notify_one();
        }
        let doubtful = doubtful.iter().map(|row| (row.event_id, row.n));
        let attempts: Vec<_> = unacknowledged.iter().copied().chain(doubtful).collect();
        table::mark_published(db, &known)
            .await
            .context("published rows cannot be marked")?;
        if !known.is_empty() && self.broker.connection_number() != connection_number {
            // The connection was replaced during the statement, which may have been slow.
            table::unmark(db, &known)
                .await
                .context("rows cannot be made pending again")?;
        }
        table::count_attempt(db, &attempts)
            .await
            .context("attempts cannot be counted")
    }
}
