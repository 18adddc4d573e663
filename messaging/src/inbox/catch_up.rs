//! Applies deferred messages in stream order once their row is free.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::Context as _;
use broker::Backoff;
use failpoint::failpoint;
use sea_orm::ConnectionTrait as _;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use crate::inbox::apply::{BLOCKED_KEYS_MAX, Blame};
use crate::inbox::consumer::Consumer;
use crate::inbox::deferred::{self, Deferred};
use crate::inbox::message::Incoming;
use crate::postgres::{sql, within};
use crate::subscriber::Subscriber;
use crate::transaction::Transaction;

/// Maximum number of deferred messages per transaction.
const BATCH_MAX: u32 = 200;
/// Maximum number of keys per round. If there are more, a whole table is probably locked, and the
/// order of rounds does not matter.
const KEYS_MAX: u32 = 2000;
/// Interval between two reads of the table while this process knows no deferred message: another
/// replica may have stored one.
const IDLE_INTERVAL: Duration = Duration::from_secs(1);
const BUSY_INTERVAL: Duration = Duration::from_millis(50);
/// Initial retry delay of a key whose row is locked or refused. It doubles each time up to the
/// maximum.
const RETRY_DELAY_MIN: Duration = Duration::from_millis(100);
const RETRY_DELAY_MAX: Duration = Duration::from_secs(1);
const STEP_TIMEOUT: Duration = Duration::from_secs(10);
/// Short, because the other keys of the batch wait too.
const LOCK_TIMEOUT: &str = "SET LOCAL lock_timeout = '20ms'";

/// Keys whose row is locked or refused, and when they are retried.
#[derive(Default)]
struct Blocked(HashMap<String, (Instant, Backoff)>);

impl Blocked {
    fn is_due(&self, key: &str) -> bool {
        let known = self.0.get(key);
        known.is_none_or(|(retry_at, _)| *retry_at <= Instant::now())
    }

    /// Returns whether the key is newly blocked.
    fn note(&mut self, key: &str) -> bool {
        let is_new = !self.0.contains_key(key);
        let new = || {
            (
                Instant::now(),
                Backoff::new(RETRY_DELAY_MIN, RETRY_DELAY_MAX),
            )
        };
        let (retry_at, backoff) = self.0.entry(key.to_owned()).or_insert_with(new);
        *retry_at = Instant::now() + backoff.pause();
        is_new
    }
}

/// Result of one transaction.
enum Step {
    /// Another replica is applying deferred messages now.
    Busy,
    Applied(usize),
}

impl<S: Subscriber> Consumer<S> {
    /// Applies deferred messages until `shutdown`.
    pub(crate) async fn catch_up(&self, shutdown: &CancellationToken) {
        let mut blocked = Blocked::default();
        loop {
            let is_idle = self.deferred_keys.is_empty();
            let interval = if is_idle {
                IDLE_INTERVAL
            } else {
                BUSY_INTERVAL
            };
            let wait = async {
                if is_idle {
                    let _ = tokio::time::timeout(interval, self.deferred_keys.added()).await;
                } else {
                    tokio::time::sleep(interval).await;
                }
            };
            if shutdown.run_until_cancelled(wait).await.is_none() {
                return;
            }
            if let Err(error) = self.round(&mut blocked, shutdown).await {
                debug!(
                    consumer = Self::NAME,
                    error = format!("{error:#}"),
                    "Deferred messages cannot be applied; retrying"
                );
                let pause = tokio::time::sleep(IDLE_INTERVAL);
                shutdown.run_until_cancelled(pause).await;
            }
        }
    }

    /// Reads the keys of deferred messages and applies the messages of keys that are due.
    async fn round(
        &self,
        blocked: &mut Blocked,
        shutdown: &CancellationToken,
    ) -> anyhow::Result<()> {
        let since = Instant::now();
        let keys = within(STEP_TIMEOUT, deferred::keys(&self.db, Self::NAME, KEYS_MAX)).await?;
        blocked.0.retain(|key, _| keys.contains(key));
        let due: Vec<String> = keys
            .iter()
            .filter(|key| blocked.is_due(key))
            .cloned()
            .collect();
        self.deferred_keys.replace(keys, since);
        let mut blocked_now = 0;
        let mut parts = vec![due];
        while let Some(keys) = parts.pop() {
            if keys.is_empty() {
                continue;
            }
            if shutdown.is_cancelled() {
                return Ok(());
            }
            match within(STEP_TIMEOUT, self.apply_deferred(&keys, BATCH_MAX)).await {
                Ok(Step::Busy) => return Ok(()),
                Ok(Step::Applied(messages)) => {
                    for key in &keys {
                        blocked.0.remove(key);
                    }
                    if messages == BATCH_MAX as usize {
                        parts.push(keys);
                    }
                }
                Err(error) => match Blame::of(error) {
                    Blame::Database(error) => return Err(error),
                    Blame::Message(_) if keys.len() == 1 => {
                        self.isolate(&keys).await?;
                        parts.push(keys);
                    }
                    Blame::Row(error) if keys.len() == 1 || blocked_now >= BLOCKED_KEYS_MAX => {
                        blocked_now += keys.len();
                        for key in &keys {
                            if blocked.note(key) {
                                info!(
                                    consumer = Self::NAME,
                                    key,
                                    error = format!("{error:#}"),
                                    "Messages of this key stay deferred: their row is locked or refused"
                                );
                            }
                        }
                    }
                    Blame::Row(_) | Blame::Message(_) => {
                        let (first, second) = keys.split_at(keys.len() / 2);
                        parts.extend([second.to_vec(), first.to_vec()]);
                    }
                },
            }
        }
        Ok(())
    }

    /// One transaction: deletes the oldest messages of these keys from the table and applies them.
    async fn apply_deferred(&self, keys: &[String], limit: u32) -> anyhow::Result<Step> {
        let Some(txn) = self.begin_catching_up().await? else {
            return Ok(Step::Busy);
        };
        let stored = deferred::take(&txn, Self::NAME, keys, limit).await?;
        failpoint!("catch_up.after_take")?;
        let headers: Vec<_> = stored.iter().map(Deferred::headers).collect();
        let batch: Vec<Incoming<'_, S::Event>> = stored
            .iter()
            .zip(&headers)
            .map(|(one, headers)| one.read(headers))
            .collect();
        let applied = self.apply_in(&txn, &batch).await?;
        txn.commit().await?;
        self.after_commit(&applied);
        if let Some(effect) = applied.effect {
            self.subscriber.committed(effect);
        }
        Ok(Step::Applied(stored.len()))
    }

    /// Isolates a message of this key that can never be applied: applies the older messages and
    /// makes this one a dead letter.
    async fn isolate(&self, key: &[String]) -> anyhow::Result<()> {
        let error = loop {
            match within(STEP_TIMEOUT, self.apply_deferred(key, 1)).await {
                Ok(Step::Applied(1)) => {}
                Ok(_) => return Ok(()),
                Err(error) => match Blame::of(error) {
                    Blame::Message(error) => break error,
                    other => return Err(other.into_error()),
                },
            }
        };
        let Some(txn) = self.begin_catching_up().await? else {
            return Ok(());
        };
        let stored = deferred::take(&txn, Self::NAME, key, 1).await?;
        let headers: Vec<_> = stored.iter().map(Deferred::headers).collect();
        let poison: Vec<Incoming<'_, S::Event>> = stored
            .iter()
            .zip(&headers)
            .map(|(one, headers)| one.read(headers).poisoned(format!("{error:#}")))
            .collect();
        let applied = self.apply_in(&txn, &poison).await?;
        txn.commit()
            .await
            .context("a dead letter cannot be stored")?;
        self.after_commit(&applied);
        Ok(())
    }

    /// Begins a transaction with the advisory lock; `None` if another replica holds it.
    async fn begin_catching_up(&self) -> anyhow::Result<Option<Transaction>> {
        let txn = self.begin("catch_up").await?;
        txn.execute(sql(LOCK_TIMEOUT, [])).await?;
        let lock = sql(
            "SELECT pg_try_advisory_xact_lock(hashtextextended('catch up: ' || $1, 0)) AS held",
            [Self::NAME.into()],
        );
        let row = txn.query_one_raw(lock).await?;
        let held: bool = row.map_or(Ok(false), |row| row.try_get("", "held"))?;
        if !held {
            txn.rollback().await?;
            return Ok(None);
        }
        Ok(Some(txn))
    }
}
