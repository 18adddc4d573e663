//! Runs a subscriber over a list of events, first without faults and then with faults, and compares
//! the results.
//!
//! The faults are those that a broker or a crash causes: duplicates, other batch boundaries,
//! rollbacks, lost acks and re-asks. Events that commute are also reordered. No broker is needed:
//! messages pass through the same code as in a consumer.

use std::fmt;

use anyhow::Context as _;
use shared_contracts::{Event, EventId};

use crate::database::Database;
use crate::inbox::apply::apply;
use crate::inbox::message::{Incoming, RawMessage};
use crate::outbox::message::Message;
use crate::outbox::publish::message_headers;
use crate::outbox::table::Pending;
use crate::postgres::now;
use crate::subscriber::Subscriber;
use crate::transaction::Work;

/// The events for a subscriber, and the expected result.
#[expect(
    async_fn_in_trait,
    reason = "only called by the harness, which needs no Send"
)]
pub trait Scenario {
    type Subscriber: Subscriber;

    /// Prepares an empty database with existing tables.
    async fn prepare(&self, db: &Database) -> anyhow::Result<Self::Subscriber>;

    /// The events, in the order in which they were published.
    fn events(&self) -> Vec<Published<<Self::Subscriber as Subscriber>::Event>>;

    /// The state that must be equal for every delivery schedule. It excludes generated ids and
    /// times.
    async fn observe(&self, db: &Database) -> anyhow::Result<String>;

    /// Checks invariants that must hold for every delivery schedule.
    async fn check(&self, _db: &Database) -> anyhow::Result<()> {
        Ok(())
    }

    /// Whether two events may be delivered in either order.
    fn commute(
        &self,
        _one: &<Self::Subscriber as Subscriber>::Event,
        _other: &<Self::Subscriber as Subscriber>::Event,
    ) -> bool {
        false
    }
}

#[derive(Clone, Debug)]
pub struct Published<E> {
    pub event_id: EventId,
    pub event: E,
}

impl<E> Published<E> {
    pub fn new(event: E) -> Self {
        Self {
            event_id: EventId::mint(),
            event,
        }
    }
}

/// Runs the scenario once without faults and then under `schedules` different fault schedules, each
/// in its own database. An error names the schedule whose result differs.
pub async fn run_under_faults<S: Scenario>(
    scenario: &S,
    schedules: u64,
    fresh_database: impl AsyncFn() -> anyhow::Result<Database>,
) -> anyhow::Result<()> {
    let events = scenario.events();
    let plain = Schedule::plain(events.len());
    let expected = run(scenario, &events, &plain, &fresh_database).await?;
    for seed in 1..=schedules {
        let may_swap =
            |one: usize, other: usize| scenario.commute(&events[one].event, &events[other].event);
        let schedule = Schedule::with_faults(events.len(), seed, may_swap);
        let observed = run(scenario, &events, &schedule, &fresh_database)
            .await
            .with_context(|| format!("schedule {seed}:\n{schedule}"))?;
        anyhow::ensure!(
            observed == expected,
            "schedule {seed} has a different result than a run without faults.\nexpected: {expected}\n\
             observed: {observed}\n{schedule}"
        );
    }
    Ok(())
}

async fn run<S: Scenario>(
    scenario: &S,
    events: &[Published<<S::Subscriber as Subscriber>::Event>],
    schedule: &Schedule,
    fresh_database: &impl AsyncFn() -> anyhow::Result<Database>,
) -> anyhow::Result<String> {
    let db = fresh_database().await?;
    let subscriber = scenario.prepare(&db).await?;
    for batch in &schedule.0 {
        let messages: Vec<Stored> = batch
            .deliveries
            .iter()
            .map(|one| Stored::new(&events[one.event], one.ask))
            .collect();
        match batch.fault {
            Fault::None => deliver(&db, &subscriber, &messages, End::Commit).await?,
            Fault::RolledBack => {
                deliver(&db, &subscriber, &messages, End::Rollback).await?;
                deliver(&db, &subscriber, &messages, End::Commit).await?;
            }
            Fault::AckLost => {
                deliver(&db, &subscriber, &messages, End::Commit).await?;
                deliver(&db, &subscriber, &messages, End::Commit).await?;
            }
        }
        scenario.check(&db).await?;
    }
    scenario.observe(&db).await
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Commit,
    Rollback,
}

async fn deliver<S: Subscriber>(
    db: &Database,
    subscriber: &S,
    messages: &[Stored],
    end: End,
) -> anyhow::Result<()> {
    let batch: Vec<Incoming<'_, S::Event>> = messages.iter().map(Stored::read).collect();
    let work = Work {
        label: S::SUBSCRIPTION.consumer,
        failpoints: "consumer",
    };
    let txn = db.begin_work(work).await?;
    let applied = apply(&txn, subscriber, &batch).await?;
    if let Some(letter) = applied.dead.first() {
        anyhow::bail!("a message was not applied: {}", letter.verdict.cause());
    }
    match end {
        End::Commit => {
            txn.commit().await?;
            if let Some(effect) = applied.effect {
                subscriber.committed(effect);
            }
        }
        End::Rollback => txn.rollback().await?,
    }
    Ok(())
}

/// A message as the broker would deliver it.
struct Stored {
    row: Pending,
    headers: async_nats::HeaderMap,
}

impl Stored {
    fn new<E: Event>(published: &Published<E>, ask: u32) -> Self {
        let Published { event_id, event } = published;
        let row = Pending::from(Message::again(*event_id, ask, event, now(), None));
        let headers = message_headers(&row);
        Self { row, headers }
    }

    fn read<E: Event>(&self) -> Incoming<'_, E> {
        Incoming::read(RawMessage {
            subject: &self.row.subject,
            headers: Some(&self.headers),
            payload: self.row.payload.as_bytes(),
            stream_sequence: 1,
            delivered: 1,
        })
    }
}

/// How the events are delivered.
struct Schedule(Vec<Batch>);

struct Batch {
    deliveries: Vec<OneDelivery>,
    fault: Fault,
}

#[derive(Clone, Copy, Debug)]
struct OneDelivery {
    /// Index in the list of events.
    event: usize,
    ask: u32,
}

#[derive(Clone, Copy, Debug)]
enum Fault {
    None,
    /// The transaction is rolled back, and the batch runs again.
    RolledBack,
    /// The ack is lost, and the batch is delivered again.
    AckLost,
}

impl Schedule {
    /// Each event once, in order, in a transaction of its own.
    fn plain(events: usize) -> Self {
        let batch = |event| Batch {
            deliveries: vec![OneDelivery { event, ask: 0 }],
            fault: Fault::None,
        };
        Self((0..events).map(batch).collect())
    }

    fn with_faults(events: usize, seed: u64, may_swap: impl Fn(usize, usize) -> bool) -> Self {
        let mut random = Random(seed);
        let mut order: Vec<usize> = (0..events).collect();
        for _ in 0..events * 2 {
            let index = random.below(events.max(2) - 1);
            let wanted = random.below(2) == 0 && index + 1 < events;
            if wanted && may_swap(order[index], order[index + 1]) {
                order.swap(index, index + 1);
            }
        }
        let mut deliveries: Vec<OneDelivery> = order
            .into_iter()
            .map(|event| OneDelivery { event, ask: 0 })
            .collect();
        // Repetitions and re-asks follow the message that they repeat.
        for _ in 0..events {
            let from = random.below(deliveries.len());
            let to = from + 1 + random.below(deliveries.len() - from);
            let repeated = OneDelivery {
                event: deliveries[from].event,
                ask: random.below(3).try_into().unwrap_or_default(),
            };
            deliveries.insert(to, repeated);
        }
        let mut batches = Vec::new();
        while !deliveries.is_empty() {
            let size = 1 + random.below(deliveries.len().min(8));
            let fault = match random.below(3) {
                0 => Fault::None,
                1 => Fault::RolledBack,
                _ => Fault::AckLost,
            };
            batches.push(Batch {
                deliveries: deliveries.drain(..size).collect(),
                fault,
            });
        }
        Self(batches)
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Batch { deliveries, fault } in &self.0 {
            write!(f, "  batch:")?;
            for OneDelivery { event, ask } in deliveries {
                write!(f, " {event}")?;
                if *ask > 0 {
                    write!(f, " (ask {ask})")?;
                }
            }
            writeln!(f, "; {fault:?}")?;
        }
        Ok(())
    }
}

/// SplitMix64: the same numbers for the same seed, on every machine.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^= mixed >> 31;
        usize::try_from(mixed % limit.max(1) as u64).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_schedule_delivers_every_event_and_is_the_same_for_the_same_seed() {
        for seed in 1..200 {
            let schedule = Schedule::with_faults(5, seed, |_, _| false);
            let again = Schedule::with_faults(5, seed, |_, _| false);
            assert_eq!(schedule.to_string(), again.to_string());
            let deliveries = || schedule.0.iter().flat_map(|batch| &batch.deliveries);
            let first = |event| deliveries().position(|one| one.event == event).unwrap();
            let firsts: Vec<usize> = (0..5).map(first).collect();
            assert!(firsts.is_sorted(), "in order: {schedule}");
            assert_eq!(deliveries().count(), 10);
        }
        let swapped = (1..200).any(|seed| {
            let schedule = Schedule::with_faults(2, seed, |_, _| true);
            schedule.0[0].deliveries[0].event == 1
        });
        assert!(swapped, "events that commute are reordered");
    }
}
