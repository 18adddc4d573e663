//! Which messages a consumer has taken, one row per event, in the transaction that holds their effects.

use std::collections::{BTreeMap, HashSet};

use sea_orm::entity::prelude::*;
use sea_orm::{DatabaseTransaction, DbErr, FromQueryResult};
use uuid::Uuid;

use crate::db::{self, sql};

/// An inbox row.
#[sea_orm::model]
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "inbox")]
pub struct Model {
    /// The durable consumer that took it.
    #[sea_orm(primary_key, auto_increment = false)]
    pub consumer: String,
    /// The fact.
    #[sea_orm(primary_key, auto_increment = false)]
    pub event_id: Uuid,
    /// Where the broker had it stored. Never an identity: sequences start again when a stream is made anew.
    pub stream_sequence: i64,
    /// Which delivery of the message this was.
    pub delivered: i32,
    /// When the transaction that took it began.
    pub received_at: TimeDateTimeWithTimeZone,
    /// How often it came again.
    pub repeats: i32,
    /// When it last came again.
    pub last_repeat_at: Option<TimeDateTimeWithTimeZone>,
}

impl ActiveModelBehavior for ActiveModel {}

/// One delivery.
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

/// Records deliveries, several of one event allowed, and says which events had not been taken before.
pub(crate) async fn record(
    txn: &DatabaseTransaction,
    consumer: &str,
    deliveries: &[Delivery],
) -> Result<HashSet<Uuid>, DbErr> {
    // Sorted by event id: two replicas with overlapping batches then wait for each other instead of deadlocking.
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
    let event_ids: Vec<Uuid> = by_event.keys().copied().collect();
    let sequences: Vec<i64> = by_event
        .values()
        .map(|(delivery, _)| delivery.stream_sequence)
        .collect();
    let delivered: Vec<i32> = by_event
        .values()
        .map(|(delivery, _)| delivery.delivered)
        .collect();
    let first: HashSet<Uuid> = EventIdRow::find_by_statement(sql(
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
    .await?
    .into_iter()
    .map(|row| row.event_id)
    .collect();

    let repeated: Vec<(Uuid, i32)> = by_event
        .iter()
        .map(|(event_id, (_, times))| {
            (
                *event_id,
                if first.contains(event_id) {
                    times - 1
                } else {
                    *times
                },
            )
        })
        .filter(|(_, repeats)| *repeats > 0)
        .collect();
    if !repeated.is_empty() {
        let (event_ids, repeats): (Vec<Uuid>, Vec<i32>) = repeated.into_iter().unzip();
        db::execute(
            txn,
            sql(
                "WITH held AS (
                     SELECT event_id FROM inbox WHERE consumer = $1 AND event_id = ANY($2::uuid[]) ORDER BY event_id FOR UPDATE
                 )
                 UPDATE inbox i SET repeats = i.repeats + v.repeats, last_repeat_at = now()
                 FROM unnest($2::uuid[], $3::integer[]) AS v (event_id, repeats) JOIN held USING (event_id)
                 WHERE i.consumer = $1 AND i.event_id = v.event_id",
                [consumer.into(), event_ids.into(), repeats.into()],
            ),
        )
        .await?;
    }
    Ok(first)
}
