//! Publishes outbox rows and marks exactly those that the broker acknowledged. Knows rows and
//! subjects, no events.

use std::time::Duration;

use anyhow::Context as _;
use broker::Broker;
use failpoint::failpoint;
use metrics::{counter, histogram};
use sea_orm::{ConnectionTrait, DatabaseConnection, TransactionTrait as _};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::health::HealthStatus;
use crate::metrics::{PUBLISH_SECONDS, PUBLISHED};
use crate::outbox::hand_off::HandOff;
use crate::outbox::publish;
use crate::outbox::schedule::{BATCH_MAX, Schedule, Step};
use crate::outbox::stream_watch::StreamWatch;
use crate::outbox::table::{self, Pending, Which};
use crate::postgres::within;

/// A step that hangs (a dead connection) is given up, and the database frees its rows. The step
/// waits for two answers of the broker, each with a timeout of its own.
const STEP_TIMEOUT: Duration = Duration::from_secs(20);
/// Polling is for what was not handed off: another replica died, or this process did before.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// One lane that polls this often is enough; the other steps in when it is stuck.
const SECOND_POLL_INTERVAL: Duration = Duration::from_secs(10);
/// On a new connection, publishing waits this long for the check of the streams.
const FIRST_CHECK_TIMEOUT: Duration = Duration::from_secs(2);

/// Moves outbox rows of one database to the broker. Any number may run on one table.
pub(crate) struct Relay {
    pub(crate) db: DatabaseConnection,
    pub(crate) broker: Broker,
    /// What was just committed in this process.
    pub(crate) hand_off: HandOff,
    pub(crate) streams: StreamWatch,
    pub(crate) health: HealthStatus,
}

impl Relay {
    /// Publishes until `shutdown`. A batch that was begun is finished; only waits are cut short.
    ///
    /// Two lanes do the same work, so that one sends the next rows while the other waits for the
    /// broker or marks.
    pub(crate) async fn run(&self, shutdown: &CancellationToken) {
        tokio::join!(
            self.streams.run(shutdown),
            self.run_lane(POLL_INTERVAL, shutdown),
            self.run_lane(SECOND_POLL_INTERVAL, shutdown),
        );
    }

    async fn run_lane(&self, poll_interval: Duration, shutdown: &CancellationToken) {
        let mut schedule = Schedule::new(poll_interval, Instant::now());
        let mut connection_number = 0;
        while !shutdown.is_cancelled() {
            if !self.broker.is_connected() {
                self.health
                    .bad("the broker is away; committed events wait in the outbox");
                shutdown
                    .run_until_cancelled(self.broker.until_connected())
                    .await;
                continue;
            }
            if connection_number != self.broker.connection_number() {
                connection_number = self.broker.connection_number();
                let checked = self.streams.until_checked(connection_number);
                let checked = tokio::time::timeout(FIRST_CHECK_TIMEOUT, checked);
                // If a stream cannot be created, publishing reports it, and others may exist.
                let _ = shutdown.run_until_cancelled(checked).await;
                schedule.start_over(Instant::now());
            }
            let which = schedule.due(Instant::now());
            let done = match which {
                Some(which) => within(STEP_TIMEOUT, self.publish_polled(which)).await,
                None => {
                    let rows = self.hand_off.take(BATCH_MAX as usize);
                    if rows.is_empty() {
                        let quiet_until = self
                            .wait(
                                schedule.next_at(),
                                poll_interval,
                                connection_number,
                                shutdown,
                            )
                            .await;
                        if let Some(then) = quiet_until {
                            schedule.nothing_waits(then);
                        }
                        continue;
                    }
                    within(STEP_TIMEOUT, self.publish_handed_off(&rows)).await
                }
            };
            if let Some(pause) = self.note(which, done, &mut schedule) {
                shutdown
                    .run_until_cancelled(tokio::time::sleep(pause))
                    .await;
            }
        }
    }

    /// Notes how a step went. Returns the pause that the lane takes, if any.
    fn note(
        &self,
        which: Option<Which>,
        done: anyhow::Result<Step>,
        schedule: &mut Schedule,
    ) -> Option<Duration> {
        match done {
            Ok(step) if step.failed == 0 => {
                if which == Some(Which::Tried) {
                    self.health.good();
                }
                schedule.done(which, step, Instant::now());
                None
            }
            Ok(step) => {
                self.health
                    .bad(format!("{} messages could not be published", step.failed));
                if step.stream_missing {
                    self.streams.check.notify_one();
                }
                let pause = schedule.failed(Instant::now());
                // If nothing at all was published, more than a few rows are to blame.
                (which != Some(Which::Tried) && step.published == 0).then_some(pause)
            }
            Err(error) => {
                if self.health.bad(format!("{error:#}")) {
                    warn!(
                        error = format!("{error:#}"),
                        "Publishing failed; trying again"
                    );
                }
                Some(schedule.failed(Instant::now()))
            }
        }
    }

    /// Waits until rows are handed off, or for the time of the next poll. Most polls find nothing:
    /// then they are a single statement, and waiting goes on. Returns until when no poll is needed.
    async fn wait(
        &self,
        mut until: Instant,
        poll_interval: Duration,
        connection_number: u64,
        shutdown: &CancellationToken,
    ) -> Option<Instant> {
        let mut quiet_until = None;
        loop {
            let arrived = tokio::time::timeout_at(until, self.hand_off.arrived());
            let woken = shutdown.run_until_cancelled(arrived).await;
            let same_connection =
                self.broker.is_connected() && self.broker.connection_number() == connection_number;
            if !matches!(woken, Some(Err(_))) || !same_connection {
                return quiet_until;
            }
            // An error shows again in the next step, which reports it.
            if within(STEP_TIMEOUT, table::has_pending(&self.db))
                .await
                .unwrap_or(true)
            {
                return quiet_until;
            }
            self.health.good();
            until = Instant::now() + poll_interval;
            quiet_until = Some(until);
        }
    }

    /// One step: takes a batch of waiting rows, publishes them, marks those whose PubAck came.
    ///
    /// The transaction stays open while the broker answers, because it holds the rows' locks:
    /// another relay skips them (SKIP LOCKED), so one relay at a time has a row, without leases or
    /// clocks. Hardly anyone else wants these locks, and the broker's answer has a timeout. If this
    /// process dies, the server frees the rows, and the next relay publishes them again under the
    /// same message id.
    async fn publish_polled(&self, which: Which) -> anyhow::Result<Step> {
        let txn = self.db.begin().await.context("the outbox cannot be read")?;
        let rows = table::lock_pending(&txn, which, BATCH_MAX)
            .await
            .context("the outbox cannot be read")?;
        if rows.is_empty() {
            txn.rollback().await.context("the outbox cannot be read")?;
            return Ok(Step::default());
        }
        let step = self.publish(&txn, &rows).await?;
        failpoint!("relay.before_commit")?;
        txn.commit()
            .await
            .context("published rows cannot be marked")?;
        failpoint!("relay.after_commit")?;
        Ok(step)
    }

    /// The same with rows that were handed off. Nobody has locked them: no relay polls for rows so
    /// young. If this process dies, one will later, and publishes them under the same message id.
    async fn publish_handed_off(&self, rows: &[Pending]) -> anyhow::Result<Step> {
        let step = self.publish(&self.db, rows).await?;
        failpoint!("relay.after_mark")?;
        Ok(step)
    }

    async fn publish(&self, db: &impl ConnectionTrait, rows: &[Pending]) -> anyhow::Result<Step> {
        failpoint!("relay.after_take")?;
        let begun = Instant::now();
        let connection_number = self.broker.connection_number();
        let mut sent = publish::publish(&self.broker, rows).await?;
        if self.broker.connection_number() != connection_number {
            // The broker that acknowledged may be gone with everything it had. Marked now, a row
            // would look as if it had been published after the loss.
            sent.doubt();
        }
        histogram!(PUBLISH_SECONDS).record(begun.elapsed());
        failpoint!("relay.after_puback")?;
        table::mark_published(db, &sent.acknowledged)
            .await
            .context("published rows cannot be marked")?;
        table::count_attempt(db, &sent.unacknowledged)
            .await
            .context("attempts cannot be counted")?;

        let (published, failed) = (sent.acknowledged.len(), sent.unacknowledged.len());
        counter!(PUBLISHED, "result" => "acknowledged").increment(published as u64);
        counter!(PUBLISHED, "result" => "failed").increment(failed as u64);
        match sent.error {
            None => debug!(published, "Outbox rows published"),
            Some(error) => {
                warn!(published, failed, error = %error, "Some outbox rows were not published; they stay");
            }
        }
        Ok(Step {
            published,
            failed,
            stream_missing: sent.stream_missing,
            newest: rows.last().map(|row| row.event_id),
        })
    }
}
