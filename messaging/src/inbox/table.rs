//! The table of events that a consumer has applied, one row per event, written in the transaction
//! that holds their effects.

use std::collections::{BTreeMap, HashSet};

use sea_orm::entity::prelude::*;
use sea_orm::{DbErr, FromQueryResult};
use uuid::Uuid;

use crate::postgres::{execute, sql};
use crate::transaction::Transaction;

#[sea_orm::model]
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "inbox")]
pub(crate) struct Model {
    #[sea_orm(primary_key, auto_increment = false)]
    pub consumer: String,
    #[sea_orm(primary_key, auto_increment = false)]
    pub event_id: Uuid,
    /// Not an identity: sequences restart when a stream is recreated.
    pub stream_sequence: i64,
    pub delivered: i32,
    pub received_at: TimeDateTimeWithTimeZone,
    /// Number of repetitions. `last_repeat_at` has the time of the last one.
    pub repeats: i32,
    pub last_repeat_at: Option<TimeDateTimeWithTimeZone>,
}

impl ActiveModelBehavior for ActiveModel {}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Delivery {
    pub(crate) event_id: Uuid,
    pub(crate) stream_sequence: i64,
    pub(crate) delivered: i32,
}

#[derive(FromQueryResult)]
struct EventIdRow {
    event_id: Uuid,
}

/// Records deliveries; one event may occur several times. Returns the new events.
pub(crate) async fn record(
    txn: &Transaction,
    consumer: &str,
    deliveries: &[Delivery],
) -> Result<HashSet<Uuid>, DbErr> {
    // Sorted by event id: two replicas with overlapping batches then wait for each other instead of
    // deadlocking.
    let mut by_event: BTreeMap<Uuid, (Delivery, i32)> = BTreeMap::new();
    for delivery in deliveries {
        by_event
            .entry(delivery.event_id)
            .or_insert((*delivery, 0))
            .1 += 1;
    }
    if by_event.is_empty() {
        return Ok(HashSet::new());
    }
    let first = insert_new(txn, consumer, &by_event).await?;
    let repeated: Vec<(Uuid, i32)> = by_event
        .iter()
        .map(|(event_id, (_, times))| {
            let is_first = i32::from(first.contains(event_id));
            (*event_id, times - is_first)
        })
        .filter(|(_, repeats)| *repeats > 0)
        .collect();
    if !repeated.is_empty() {
        count_repeats(txn, consumer, repeated).await?;
    }
    Ok(first)
}

async fn insert_new(
    txn: &Transaction,
    consumer: &str,
    by_event: &BTreeMap<Uuid, (Delivery, i32)>,
) -> Result<HashSet<Uuid>, DbErr> {
    let deliveries = || by_event.values().map(|(delivery, _)| delivery);
    let event_ids: Vec<Uuid> = by_event.keys().copied().collect();
    let sequences: Vec<i64> = deliveries().map(|one| one.stream_sequence).collect();
    let delivered: Vec<i32> = deliveries().map(|one| one.delivered).collect();
    let inserted = EventIdRow::find_by_statement(sql(
        "INSERT INTO inbox (consumer, event_id, stream_sequence, delivered)
         SELECT $1, * FROM unnest($2::uuid[], $3::bigint[], $4::integer[])
         ON CONFLICT (consumer, event_id) DO NOTHING RETURNING event_id",
        [
            consumer.into(),
            event_ids.into(),
            sequences.into(),
            delivered.into(),
        ],
    ))
    .all(txn)
    .await?;
    Ok(inserted.into_iter().map(|row| row.event_id).collect())
}

async fn count_repeats(
    txn: &Transaction,
    consumer: &str,
    repeated: Vec<(Uuid, i32)>,
) -> Result<(), DbErr> {
    let (event_ids, repeats): (Vec<Uuid>, Vec<i32>) = repeated.into_iter().unzip();
    let update = sql(
        "WITH held AS (
             SELECT event_id FROM inbox WHERE consumer = $1 AND event_id = ANY($2::uuid[])
             ORDER BY event_id FOR UPDATE
         )
         UPDATE inbox i SET repeats = i.repeats + v.repeats, last_repeat_at = now()
         FROM unnest($2::uuid[], $3::integer[]) AS v (event_id, repeats) JOIN held USING (event_id)
         WHERE i.consumer = $1 AND i.event_id = v.event_id",
        [consumer.into(), event_ids.into(), repeats.into()],
    );
    execute(txn, update).await?;
    Ok(())
}
