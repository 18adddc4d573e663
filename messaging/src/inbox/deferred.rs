//! Deferred messages: another transaction has locked their row, or the database refuses it for now.
//!
//! They are stored here and acknowledged, so that they do not count towards the limit of
//! unacknowledged messages. [`catch_up`](super::catch_up) applies them.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sea_orm::{ConnectionTrait, DbErr, FromQueryResult};
use sha2::{Digest as _, Sha256};
use shared_contracts::Event;
use tokio::sync::Notify;
use tokio::time::Instant;
use uuid::Uuid;

use crate::database::Database;
use crate::inbox::message::{Incoming, RawMessage, header_lines, parse_header_lines};
use crate::postgres::{execute, sql};
use crate::transaction::Transaction;

/// A stored deferred message.
#[derive(Clone, Debug, FromQueryResult)]
pub(crate) struct Deferred {
    pub(crate) stream_sequence: i64,
    delivered: i32,
    subject: String,
    headers: Vec<u8>,
    payload: Vec<u8>,
}

impl Deferred {
    pub(crate) fn headers(&self) -> async_nats::HeaderMap {
        parse_header_lines(&self.headers)
    }

    pub(crate) fn read<'a, E: Event>(
        &'a self,
        headers: &'a async_nats::HeaderMap,
    ) -> Incoming<'a, E> {
        Incoming::read(RawMessage {
            subject: &self.subject,
            headers: Some(headers),
            payload: &self.payload,
            stream_sequence: self.stream_sequence,
            delivered: self.delivered,
        })
    }
}

/// A message to be deferred.
pub(crate) struct Deferral<'a> {
    pub(crate) raw: RawMessage<'a>,
    pub(crate) ordering_key: String,
    pub(crate) event_id: Uuid,
    pub(crate) ask: i32,
}

/// Stores messages. A message that is already stored keeps its place and gets the highest ask of
/// its repetitions, so that re-asks do not make the table grow.
pub(crate) async fn store(
    txn: &Transaction,
    consumer: &str,
    deferrals: Vec<Deferral<'_>>,
) -> Result<(), DbErr> {
    let mut rows: BTreeMap<(Uuid, Vec<u8>), Deferral<'_>> = BTreeMap::new();
    for one in deferrals {
        let hash = Sha256::digest(one.raw.payload).to_vec();
        let earlier = rows.get(&(one.event_id, hash.clone()));
        if earlier.is_none_or(|earlier| earlier.ask < one.ask) {
            let first = earlier.map_or(one.raw.stream_sequence, |one| one.raw.stream_sequence);
            let mut row = one;
            row.raw.stream_sequence = first.min(row.raw.stream_sequence);
            rows.insert((row.event_id, hash), row);
        }
    }
    if rows.is_empty() {
        return Ok(());
    }
    let (keys, rows): (Vec<_>, Vec<_>) = rows.into_iter().unzip();
    let (event_ids, hashes): (Vec<Uuid>, Vec<Vec<u8>>) = keys.into_iter().unzip();
    let ordering_keys: Vec<String> = rows.iter().map(|one| one.ordering_key.clone()).collect();
    let asks: Vec<i32> = rows.iter().map(|one| one.ask).collect();
    let sequences: Vec<i64> = rows.iter().map(|one| one.raw.stream_sequence).collect();
    let delivered: Vec<i32> = rows.iter().map(|one| one.raw.delivered).collect();
    let subjects: Vec<String> = rows.iter().map(|one| one.raw.subject.to_owned()).collect();
    let headers: Vec<Vec<u8>> = rows
        .iter()
        .map(|one| header_lines(one.raw.headers, |_| true))
        .collect();
    let payloads: Vec<Vec<u8>> = rows.iter().map(|one| one.raw.payload.to_vec()).collect();
    let insert = sql(
        "INSERT INTO deferred (consumer, event_id, payload_hash, ordering_key, ask,
                               stream_sequence, delivered, subject, headers, payload)
         SELECT $1, * FROM unnest($2::uuid[], $3::bytea[], $4::text[], $5::integer[],
                                  $6::bigint[], $7::integer[], $8::text[], $9::bytea[],
                                  $10::bytea[])
         ON CONFLICT (consumer, event_id, payload_hash) DO UPDATE
             SET ask = EXCLUDED.ask, headers = EXCLUDED.headers
             WHERE deferred.ask < EXCLUDED.ask",
        [
            consumer.into(),
            event_ids.into(),
            hashes.into(),
            ordering_keys.into(),
            asks.into(),
            sequences.into(),
            delivered.into(),
            subjects.into(),
            headers.into(),
            payloads.into(),
        ],
    );
    execute(txn, insert).await?;
    Ok(())
}

/// Deletes the oldest messages of these keys from the table and returns them in stream order.
pub(crate) async fn take(
    txn: &Transaction,
    consumer: &str,
    keys: &[String],
    limit: u32,
) -> Result<Vec<Deferred>, DbErr> {
    let delete = sql(
        "WITH oldest AS (
             SELECT event_id, payload_hash FROM deferred
             WHERE consumer = $1 AND ordering_key = ANY($2::text[])
             ORDER BY stream_sequence, event_id LIMIT $3 FOR UPDATE)
         DELETE FROM deferred d USING oldest
         WHERE d.consumer = $1 AND d.event_id = oldest.event_id
           AND d.payload_hash = oldest.payload_hash
         RETURNING d.stream_sequence, d.delivered, d.subject, d.headers, d.payload",
        [
            consumer.into(),
            keys.to_vec().into(),
            i64::from(limit).into(),
        ],
    );
    let mut taken = Deferred::find_by_statement(delete).all(txn).await?;
    taken.sort_by_key(|one| one.stream_sequence);
    Ok(taken)
}

#[derive(FromQueryResult)]
struct KeyRow {
    ordering_key: String,
}

/// Returns up to `limit` keys of stored messages.
pub(crate) async fn keys(db: &Database, consumer: &str, limit: u32) -> Result<Vec<String>, DbErr> {
    let query = sql(
        "SELECT DISTINCT ordering_key FROM deferred WHERE consumer = $1 LIMIT $2",
        [consumer.into(), i64::from(limit).into()],
    );
    let rows = KeyRow::find_by_statement(query).all(db).await?;
    Ok(rows.into_iter().map(|row| row.ordering_key).collect())
}

/// Returns those of these keys that have stored messages.
pub(crate) async fn waiting(
    db: &impl ConnectionTrait,
    consumer: &str,
    keys: Vec<String>,
) -> Result<HashSet<String>, DbErr> {
    let query = sql(
        "SELECT DISTINCT ordering_key FROM deferred
         WHERE consumer = $1 AND ordering_key = ANY($2::text[])",
        [consumer.into(), keys.into()],
    );
    let rows = KeyRow::find_by_statement(query).all(db).await?;
    Ok(rows.into_iter().map(|row| row.ordering_key).collect())
}

/// The keys of deferred messages that this process knows. Clones share one state.
///
/// Usually there are none, and then the table is not queried. If a key is missing here, only the
/// order of two messages may change.
#[derive(Clone, Debug, Default)]
pub(crate) struct DeferredKeys(Arc<State>);

#[derive(Debug, Default)]
struct State {
    /// Each key, and since when it is known.
    keys: Mutex<HashMap<String, Instant>>,
    added: Notify,
}

impl DeferredKeys {
    pub(crate) fn is_empty(&self) -> bool {
        self.keys().is_empty()
    }

    pub(crate) fn contains(&self, key: &str) -> bool {
        self.keys().contains_key(key)
    }

    pub(crate) fn add(&self, keys: impl IntoIterator<Item = String>) {
        let now = Instant::now();
        self.keys().extend(keys.into_iter().map(|key| (key, now)));
        self.0.added.notify_one();
    }

    /// Replaces the keys with those that the table had at `since`. Keys that were added later are
    /// kept.
    pub(crate) fn replace(&self, found: Vec<String>, since: Instant) {
        let mut keys = self.keys();
        keys.retain(|_, added| *added >= since);
        for key in found {
            keys.entry(key).or_insert(since);
        }
    }

    /// Returns once keys have been added, including before the call.
    pub(crate) async fn added(&self) {
        self.0.added.notified().await;
    }

    fn keys(&self) -> MutexGuard<'_, HashMap<String, Instant>> {
        // Each change is one operation, so a panic leaves the map consistent.
        self.0.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_added_after_the_table_was_read_is_kept() {
        let known = DeferredKeys::default();
        known.add(["gone".to_owned()]);
        let since = Instant::now();
        known.add(["young".to_owned()]);
        known.replace(vec!["found".to_owned()], since);
        let kept = ["gone", "young", "found"].map(|key| known.contains(key));
        assert_eq!(kept, [false, true, true]);
    }
}
