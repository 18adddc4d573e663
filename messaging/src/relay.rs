//! Publishes outbox rows and marks exactly those that the broker acknowledged. Knows rows and subjects, no events.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::Context as _;
use async_nats::jetstream::stream;
use failpoint::failpoint;
use metrics::{counter, histogram};
use sea_orm::{ConnectionTrait, DatabaseConnection, TransactionTrait};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::broker::{Broker, jitter};
use crate::db;
use crate::losses::Losses;
use crate::measure;
use crate::outbox::{self, Pending, Which};
use crate::outlet::Outlet;
use crate::publish;
use crate::schedule::{BATCH_MAX, Schedule, Step};
use crate::topology::{self, Ensured, StreamState};
use crate::vital::Vital;
use shared_contracts::DLQ_STREAM;

/// A step that hangs (a connection into nothing) is given up; the database frees its rows. The broker has two answers to
/// give in it, each with a time limit of its own.
const STEP_TIMEOUT: Duration = Duration::from_secs(20);
/// What was committed is handed over. Looking is for what was not: another replica died, or we did.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// One lane that looks so often is enough; the other is there when it is stuck.
const SECOND_POLL_INTERVAL: Duration = Duration::from_secs(10);
/// While nothing fails, the streams are looked at this often: nobody tells a relay that is idle that they are gone.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);
/// On a new connection, publishing waits so long for the look at the streams, which may have to be made first.
const FIRST_LOOK_TIMEOUT: Duration = Duration::from_secs(2);
/// Where a stream cannot be made, that is tried again after so long, then less often.
const RETRY_DELAY_MIN: Duration = Duration::from_millis(100);
const RETRY_DELAY_MAX: Duration = Duration::from_secs(5);

/// Moves outbox rows of one database to the broker. Any number may run on the same table.
pub struct Relay {
    /// Pool of the flow, not of the HTTP side.
    pub db: DatabaseConnection,
    /// Where to publish.
    pub broker: Broker,
    /// Streams this service owns; the relay makes them when they are absent.
    pub streams: Vec<stream::Config>,
    /// What was just committed in this process.
    pub outlet: Outlet,
    /// Told when the broker is found to have lost what it had acknowledged.
    pub losses: Losses,
    /// How publishing goes.
    pub vital: Vital,
    /// How the streams are.
    pub streams_vital: Vital,
}

impl Relay {
    /// Publishes until `shutdown`. A batch that was begun is finished; only waits are cut short.
    ///
    /// Two lanes do the same, so that one sends the next rows while the other waits for the broker or marks.
    pub async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        let look = Notify::new();
        let (looked, looks) = watch::channel(0);
        tokio::join!(
            self.watch_streams(&look, &looked, &shutdown),
            self.go(looks.clone(), POLL_INTERVAL, &look, &shutdown),
            self.go(looks, SECOND_POLL_INTERVAL, &look, &shutdown),
        );
        Ok(())
    }

    /// One lane.
    async fn go(
        &self,
        mut looks: watch::Receiver<u64>,
        poll_interval: Duration,
        look: &Notify,
        shutdown: &CancellationToken,
    ) {
        let mut schedule = Schedule::new(poll_interval, Instant::now());
        let mut connection_number = 0;
        while !shutdown.is_cancelled() {
            if !self.broker.is_connected() {
                self.vital.bad(
                    "the broker is away; what is committed is kept and published when it returns",
                );
                shutdown
                    .run_until_cancelled(self.broker.until_connected())
                    .await;
                continue;
            }
            if connection_number != self.broker.connection_number() {
                connection_number = self.broker.connection_number();
                let looked = looks.wait_for(|number| *number == connection_number);
                // Where the streams cannot be made, publishing says so too, and another stream may be there.
                let _ = shutdown
                    .run_until_cancelled(tokio::time::timeout(FIRST_LOOK_TIMEOUT, looked))
                    .await;
                schedule.begin_anew(Instant::now());
            }
            let which = schedule.due(Instant::now());
            let done = match which {
                Some(which) => db::within(STEP_TIMEOUT, self.publish_found(which)).await,
                None => {
                    let rows = self.outlet.take(BATCH_MAX as usize);
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
                    db::within(STEP_TIMEOUT, self.publish_handed(&rows)).await
                }
            };
            match done {
                Ok(step) if step.failed == 0 => {
                    if which == Some(Which::Tried) {
                        self.vital.good();
                    }
                    schedule.done(which, step, Instant::now());
                }
                Ok(step) => {
                    self.vital
                        .bad(format!("{} messages could not be published", step.failed));
                    if step.stream_missing {
                        look.notify_one();
                    }
                    let pause = schedule.failed(Instant::now());
                    if which != Some(Which::Tried) && step.published == 0 {
                        // Nothing goes through: not a few rows are to blame.
                        shutdown
                            .run_until_cancelled(tokio::time::sleep(pause))
                            .await;
                    }
                }
                Err(error) => {
                    if self.vital.bad(format!("{error:#}")) {
                        warn!(
                            error = format!("{error:#}"),
                            "Publishing does not work; trying again"
                        );
                    }
                    let pause = schedule.failed(Instant::now());
                    shutdown
                        .run_until_cancelled(tokio::time::sleep(pause))
                        .await;
                }
            }
        }
    }

    /// Waits until something is handed over, or for the time of the next look. A look that finds nothing, which is what most
    /// of them do, is a single statement, and waiting goes on; then this says until when nobody needs to look again.
    async fn wait(
        &self,
        mut until: Instant,
        poll_interval: Duration,
        connection_number: u64,
        shutdown: &CancellationToken,
    ) -> Option<Instant> {
        let mut quiet_until = None;
        loop {
            let woken = shutdown
                .run_until_cancelled(tokio::time::timeout_at(until, self.outlet.come()))
                .await;
            let same_connection =
                self.broker.is_connected() && self.broker.connection_number() == connection_number;
            if !matches!(woken, Some(Err(_))) || !same_connection {
                return quiet_until;
            }
            // An error shows in the next step, which tells it.
            if db::within(STEP_TIMEOUT, outbox::something_waits(&self.db))
                .await
                .unwrap_or(true)
            {
                return quiet_until;
            }
            self.vital.good();
            until = Instant::now() + poll_interval;
            quiet_until = Some(until);
        }
    }

    /// One step: takes a batch of waiting rows, publishes them, marks those whose PubAck came.
    ///
    /// The transaction stays open while the broker answers, because it holds the rows' locks: another relay passes
    /// over them (SKIP LOCKED), so a row is found by one relay at a time without leases or clocks. Nobody waits for these
    /// locks but who marks a row that took longer than all others, and the broker's answer has a time limit. If this
    /// process dies, the server frees the rows and the next relay publishes them again under the same message id.
    async fn publish_found(&self, which: Which) -> anyhow::Result<Step> {
        let txn = self.db.begin().await.context("the outbox cannot be read")?;
        let rows = outbox::lock_pending(&txn, which, BATCH_MAX)
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

    /// The same with rows that were handed over. They are locked by nobody: no other relay looks for rows so young. If this
    /// process dies, one will, and publishes them again under the same message id.
    async fn publish_handed(&self, rows: &[Pending]) -> anyhow::Result<Step> {
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
            // Who said so may be gone with all that it had. Marked now, a row would look as if it had been published since.
            sent.doubt();
        }
        histogram!(measure::PUBLISH_SECONDS).record(begun.elapsed());
        failpoint!("relay.after_puback")?;
        outbox::mark_published(db, &sent.acknowledged)
            .await
            .context("published rows cannot be marked")?;
        outbox::count_attempt(db, &sent.unacknowledged)
            .await
            .context("attempts cannot be counted")?;

        let (published, failed) = (sent.acknowledged.len(), sent.unacknowledged.len());
        counter!(measure::PUBLISHED, "result" => "acknowledged").increment(published as u64);
        counter!(measure::PUBLISHED, "result" => "failed").increment(failed as u64);
        match sent.error {
            None => debug!(published, "Outbox rows published"),
            Some(error) => {
                warn!(published, failed, error = %error, "Some outbox rows could not be published; they stay");
            }
        }
        Ok(Step {
            published,
            failed,
            stream_missing: sent.stream_missing,
            newest: rows.last().map(|row| row.event_id),
        })
    }

    /// Looks at the streams on every new connection, when publishing misses one, and every now and then.
    async fn watch_streams(
        &self,
        look: &Notify,
        looked: &watch::Sender<u64>,
        shutdown: &CancellationToken,
    ) {
        let mut states = HashMap::new();
        let mut retry_delay = RETRY_DELAY_MIN;
        while !shutdown.is_cancelled() {
            if !self.broker.is_connected() {
                self.streams_vital.bad("the broker is away");
                shutdown
                    .run_until_cancelled(self.broker.until_connected())
                    .await;
                continue;
            }
            let connection_number = self.broker.connection_number();
            let pause = match self.look_at_streams(&mut states).await {
                Ok(()) => {
                    self.streams_vital.good();
                    looked.send_replace(connection_number);
                    retry_delay = RETRY_DELAY_MIN;
                    LOOK_INTERVAL
                }
                Err(error) => {
                    if self.streams_vital.bad(format!("{error:#}")) {
                        warn!(
                            error = format!("{error:#}"),
                            "A stream cannot be looked at or made; trying again"
                        );
                    }
                    let pause = retry_delay.mul_f64(jitter());
                    retry_delay = (retry_delay * 2).min(RETRY_DELAY_MAX);
                    pause
                }
            };
            tokio::select! {
                () = shutdown.cancelled() => {}
                () = tokio::time::sleep(pause) => {}
                () = look.notified() => {}
                () = self.broker.until_reconnected(connection_number) => {}
            }
        }
    }

    /// Makes the service's streams where they are absent, and notices what the broker has lost: a stream that is new
    /// (whoever made it), or that ends before where it ended when it was last looked at.
    async fn look_at_streams(
        &self,
        states: &mut HashMap<String, StreamState>,
    ) -> anyhow::Result<()> {
        let mut trouble = None;
        for wanted in &self.streams {
            let begun = Instant::now();
            // One stream that cannot be made must not keep the rows of the others.
            let (state, ensured) =
                match topology::ensure_stream(self.broker.jetstream(), wanted).await {
                    Ok(found) => found,
                    Err(error) => {
                        trouble = Some(error);
                        continue;
                    }
                };
            let earlier = states.get(&wanted.name);
            let shrunk = earlier.is_some_and(|earlier| {
                earlier.made_at != state.made_at || earlier.last_sequence > state.last_sequence
            });
            if earlier.is_none_or(|earlier| earlier.drift != state.drift) {
                for difference in &state.drift {
                    let stream = &wanted.name;
                    warn!(
                        stream,
                        difference,
                        "Stream differs from what this version would make; nothing is changed"
                    );
                }
            }
            states.insert(wanted.name.clone(), state);
            if ensured == Ensured::Made || shrunk {
                // Until we made it, it could take nothing. Who else made it, or cut it off, did so we do not know when.
                if wanted.name != DLQ_STREAM {
                    self.losses.note(if ensured == Ensured::Made {
                        begun
                    } else {
                        Instant::now()
                    });
                }
                // Of an installation that is just made, nothing can be lost.
                let something =
                    db::within(STEP_TIMEOUT, outbox::something_was_published(&self.db)).await;
                if something.unwrap_or(true) {
                    warn!(
                        stream = wanted.name,
                        "The broker does not have what it had acknowledged; it is asked for again"
                    );
                }
            }
        }
        trouble.map_or(Ok(()), Err)
    }
}
