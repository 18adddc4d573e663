//! The table of events that a consumer has applied, one row per event, written in the transaction
//! that holds their effects.

use std::collections::BTreeMap;

use sea_orm::entity::prelude::*;
use sea_orm::{DbErr, Value};
use uuid::Uuid;

use crate::postgres::{execute, sql};

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

/// The rows of a batch, sorted by event id: two replicas with overlapping batches then wait for
/// each other instead of deadlocking. Each has its number of deliveries, since one event may occur
/// several times.
#[derive(Debug)]
pub(crate) struct Arrivals {
    consumer: &'static str,
    by_event: BTreeMap<Uuid, (Delivery, i32)>,
}

impl Arrivals {
    pub(crate) fn new(consumer: &'static str, deliveries: &[Delivery]) -> Self {
        let mut by_event: BTreeMap<Uuid, (Delivery, i32)> = BTreeMap::new();
        for delivery in deliveries {
            let (_, times) = by_event.entry(delivery.event_id).or_insert((*delivery, 0));
            *times += 1;
        }
        Self { consumer, by_event }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.by_event.is_empty()
    }

    /// The insert, without what it returns. Its parameters begin with number `first`.
    pub(crate) fn insert(&self, first: usize) -> (String, [Value; 4]) {
        let [event_ids, sequences, delivered] = [first + 1, first + 2, first + 3];
        let text = format!(
            "INSERT INTO inbox (consumer, event_id, stream_sequence, delivered)
             SELECT ${first}, * FROM unnest(${event_ids}::uuid[], ${sequences}::bigint[],
                                            ${delivered}::integer[])
             ON CONFLICT (consumer, event_id) DO NOTHING"
        );
        let deliveries = || self.by_event.values().map(|(delivery, _)| delivery);
        let event_ids: Vec<Uuid> = self.by_event.keys().copied().collect();
        let sequences: Vec<i64> = deliveries().map(|one| one.stream_sequence).collect();
        let delivered: Vec<i32> = deliveries().map(|one| one.delivered).collect();
        let values = [
            self.consumer.into(),
            event_ids.into(),
            sequences.into(),
            delivered.into(),
        ];
        (text, values)
    }

    /// Records the deliveries. Returns the number of new events.
    pub(crate) async fn record(&self, txn: &impl ConnectionTrait) -> Result<u64, DbErr> {
        let (text, values) = self.insert(1);
        execute(txn, sql(&text, values)).await
    }

    /// Counts the repetitions among deliveries of which this transaction has recorded `first`.
    pub(crate) async fn count_repeats(
        &self,
        txn: &impl ConnectionTrait,
        first: u64,
    ) -> Result<(), DbErr> {
        let all: i32 = self.by_event.values().map(|(_, times)| times).sum();
        if u64::try_from(all).unwrap_or_default() <= first {
            return Ok(());
        }
        let event_ids: Vec<Uuid> = self.by_event.keys().copied().collect();
        let times: Vec<i32> = self.by_event.values().map(|(_, times)| *times).collect();
        let update = sql(
            "WITH held AS (
                 SELECT event_id, (xmin = pg_current_xact_id()::xid)::integer AS new
                 FROM inbox WHERE consumer = $1 AND event_id = ANY($2::uuid[])
                 ORDER BY event_id FOR UPDATE
             )
             UPDATE inbox i SET repeats = i.repeats + v.times - held.new, last_repeat_at = now()
             FROM unnest($2::uuid[], $3::integer[]) AS v (event_id, times)
                  JOIN held USING (event_id)
             WHERE i.consumer = $1 AND i.event_id = v.event_id AND v.times > held.new",
            [self.consumer.into(), event_ids.into(), times.into()],
        );
        execute(txn, update).await?;
        Ok(())
    }
}
