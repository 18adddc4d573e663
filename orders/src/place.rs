//! Placing orders: the queue, then the group, then the transaction.
//!
//! All requests that were queued while the last transaction ran go into the next one. No request is
//! delayed to fill a group. Under load, groups form by themselves, and one commit stores a group.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use failpoint::{failpoint, removed};
use messaging::{Database, Failure, Message, retry_unless_locked, sql};
use sea_orm::DbErr;
use service_kit::idempotency::Execution;
use sha2::{Digest as _, Sha256};
use shared_contracts::{Amount, EventId, OrderId, OrderPlaced, UserId};
use time::OffsetDateTime;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::entity::order::{self, Model, Status};
use crate::error::Error;
use crate::metrics;

/// Maximum number of orders in one transaction. More would only add latency.
const GROUP_MAX: usize = 200;
/// Maximum number of queued requests. A healthy database stores this many in well under a second. A
/// longer queue would only hide that the database is not healthy.
const QUEUE_MAX: usize = 2000;
/// A request that waited this long is rejected instead of stored, because its client gives up soon.
/// A request that would miss this deadline is rejected at once.
const WAIT_MAX: Duration = Duration::from_secs(2);
/// How long queued requests are still stored after a shutdown begins.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(6);

/// An order to place. Its ids are minted before the first attempt, so that a retry recognises its
/// own row.
#[derive(Clone, Debug)]
pub struct NewOrder {
    pub id: OrderId,
    pub placed_event_id: EventId,
    pub user_id: UserId,
    pub amount: Amount,
    pub description: String,
    pub idempotency_key: String,
    pub created_at: OffsetDateTime,
    pub traceparent: Option<String>,
}

/// A stored order, and whether this request placed it or an earlier one with the same key.
#[derive(Clone, Debug)]
pub struct Placed {
    pub order: Model,
    pub execution: Execution,
}

struct Queued {
    new: NewOrder,
    since: Instant,
    answer: oneshot::Sender<Result<Placed, Error>>,
}

/// The queue of orders to place. Cheap to clone.
#[derive(Clone)]
pub struct Intake {
    queue: mpsc::Sender<Queued>,
    pace: Pace,
}

/// Takes orders from the queue and stores them in groups.
pub struct Batcher {
    queue: mpsc::Receiver<Queued>,
    pace: Pace,
}

/// How long the last group took to store, in microseconds.
#[derive(Clone, Default)]
struct Pace(Arc<AtomicU64>);

impl Pace {
    fn note(&self, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.0.store(micros, Ordering::Relaxed);
    }

    /// Estimates, from the duration of the last group, whether a request behind `ahead` others
    /// finishes within [`WAIT_MAX`]. It waits for the group that is being stored, for the full
    /// groups ahead of it, and for its own group.
    ///
    /// A request that fits into the next group is always accepted. Otherwise, after one slow group,
    /// no request would ever be accepted again.
    fn is_in_time(&self, ahead: usize) -> bool {
        let full = ahead / GROUP_MAX;
        let groups = u32::try_from(full).unwrap_or(u32::MAX).saturating_add(2);
        let group = Duration::from_micros(self.0.load(Ordering::Relaxed));
        full == 0 || group.saturating_mul(groups) <= WAIT_MAX
    }
}

/// Creates an empty queue and the batcher that reads it.
pub fn intake() -> (Intake, Batcher) {
    let (sender, receiver) = mpsc::channel(QUEUE_MAX);
    let pace = Pace::default();
    let intake = Intake {
        queue: sender,
        pace: pace.clone(),
    };
    let batcher = Batcher {
        queue: receiver,
        pace,
    };
    (intake, batcher)
}

impl Intake {
    /// Queues an order and waits until its group is stored.
    pub async fn place(&self, new: NewOrder) -> Result<Placed, Error> {
        let ahead = self.queue.max_capacity() - self.queue.capacity();
        if !self.pace.is_in_time(ahead) {
            return Err(Error::Overloaded);
        }
        let (answer, answered) = oneshot::channel();
        let queued = Queued {
            new,
            since: Instant::now(),
            answer,
        };
        self.queue.try_send(queued).map_err(|_| Error::Overloaded)?;
        // The batcher drops a request without an answer only if the process stops.
        answered.await.unwrap_or(Err(Error::Stopping))
    }
}

impl Batcher {
    /// Runs until no [`Intake`] is left, but at most `DRAIN_TIMEOUT` after `shutdown`.
    pub async fn run(mut self, db: &Database, shutdown: CancellationToken) -> anyhow::Result<()> {
        let overdue = async {
            shutdown.cancelled().await;
            tokio::time::sleep(DRAIN_TIMEOUT).await;
        };
        let mut overdue = std::pin::pin!(overdue);
        let mut group = Vec::with_capacity(GROUP_MAX);
        loop {
            let taken = tokio::select! {
                taken = self.queue.recv_many(&mut group, GROUP_MAX) => taken,
                () = &mut overdue => 0,
            };
            if taken == 0 {
                return Ok(());
            }
            store(db, group.drain(..), &self.pace).await;
        }
    }
}

/// Stores a group and answers each request. If a client disconnects meanwhile, its order is stored
/// nevertheless, and a retry with the same key finds it.
async fn store(db: &Database, group: impl Iterator<Item = Queued>, pace: &Pace) {
    let mut new = Vec::with_capacity(GROUP_MAX);
    let mut answers = Vec::with_capacity(GROUP_MAX);
    for queued in group {
        if queued.since.elapsed() > WAIT_MAX {
            let _ = queued.answer.send(Err(Error::Overloaded));
        } else if !queued.answer.is_closed() {
            new.push(queued.new);
            answers.push(queued.answer);
        }
    }
    if new.is_empty() {
        return;
    }
    let begun = Instant::now();
    let placed = place(db, &new).await;
    pace.note(begun.elapsed());
    match placed {
        Ok(placements) => {
            for (answer, placement) in answers.into_iter().zip(placements) {
                let _ = answer.send(placement.into());
            }
        }
        // An order must not fail the others if the database refuses it, or if another transaction
        // is storing its key.
        Err(failure) if new.len() > 1 && concerns_one(&failure) => {
            warn!(
                orders = new.len(),
                error = %failure,
                "Storing a group of orders failed; storing them one by one"
            );
            for (answer, one) in answers.into_iter().zip(&new) {
                let placed = place_alone(db, one).await;
                let placed = placed.map(|mut placements| placements.remove(0));
                let _ = answer.send(placed.map_err(Error::from).and_then(Result::from));
            }
        }
        Err(failure) => {
            for answer in answers {
                let _ = answer.send(Err(failure.clone().into()));
            }
        }
    }
}

/// Whether a single order may have caused the failure, so that the others can be stored without it.
fn concerns_one(failure: &Failure) -> bool {
    let is_refused = matches!(failure, Failure::NotDone(_)) && !failure.is_transient();
    is_refused || failure.is_lock_timeout()
}

/// The result for one order of a group.
#[expect(
    clippy::large_enum_variant,
    reason = "nearly all values are the large variant, and all are short-lived"
)]
enum Placement {
    Placed(Placed),
    /// Its key was used for another request.
    KeyReused,
}

impl From<Placement> for Result<Placed, Error> {
    fn from(placement: Placement) -> Self {
        match placement {
            Placement::Placed(placed) => Ok(placed),
            Placement::KeyReused => Err(Error::KeyReused),
        }
    }
}

/// Stores the orders and their events in one transaction. A reused key fails only its own order. If
/// another transaction is storing one of the keys, this fails after the lock timeout.
async fn place(db: &Database, new: &[NewOrder]) -> Result<Vec<Placement>, Failure> {
    retry_unless_locked(|| place_once(db, new, Wait::ForLocks)).await
}

/// Stores one order of a group that was refused. The group has waited for locks already: the orders
/// behind this one do not wait once more for each key that is held.
async fn place_alone(db: &Database, new: &NewOrder) -> Result<Vec<Placement>, Failure> {
    let new = std::slice::from_ref(new);
    retry_unless_locked(|| place_once(db, new, Wait::Hardly)).await
}

/// How long a transaction waits for a key that another transaction is storing.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wait {
    ForLocks,
    Hardly,
}

async fn place_once(
    db: &Database,
    new: &[NewOrder],
    wait: Wait,
) -> Result<Vec<Placement>, Failure> {
    failpoint!("place.before_begin")?;
    let change = order::insert_new(new.iter().map(Model::from).collect());
    let messages = new.iter().filter(|_| !removed!("place.outbox_row"));
    let messages = messages.map(placed_event).collect();
    let changed = match wait {
        Wait::ForLocks => db.change_and_enqueue("place", change, messages).await?,
        Wait::Hardly => {
            let txn = db.begin("place").await?;
            txn.execute(sql("SET LOCAL lock_timeout = '10ms'", []))
                .await?;
            let changed = txn.change_and_enqueue(change, messages).await?;
            txn.commit().await?;
            changed
        }
    };
    let inserted = order::inserted_ids(&changed)?;
    let is_new = |one: &NewOrder| inserted.contains(&one.id.as_uuid());

    // For each known key, read the order that was created with it. Orders are never deleted.
    let known: Vec<&NewOrder> = new.iter().filter(|one| !is_new(one)).collect();
    let mut by_key: HashMap<(String, String), Model> = HashMap::new();
    if !known.is_empty() {
        let user_ids = known.iter().map(|one| one.user_id.to_string()).collect();
        let keys = known.iter().map(|one| one.idempotency_key.clone());
        for row in order::find_by_keys(db, user_ids, keys.collect()).await? {
            by_key.insert((row.user_id.clone(), row.idempotency_key.clone()), row);
        }
    }
    metrics::placed(inserted.len(), known.len());

    new.iter()
        .map(|one| {
            if is_new(one) {
                debug!(order.id = %one.id, user.id = %one.user_id, amount = one.amount.minor_units(), "Order placed");
                return Ok(Placement::Placed(Placed {
                    order: Model::from(one),
                    execution: Execution::First,
                }));
            }
            // Cloned, not taken: several requests with one key may be in one group.
            let key = (one.user_id.to_string(), one.idempotency_key.clone());
            let stored = by_key.get(&key).cloned().ok_or_else(|| {
                let order = format!("the order with the key of {}", one.id);
                DbErr::RecordNotFound(order)
            })?;
            Ok(known_key(one, stored))
        })
        .collect()
}

/// The answer to a request whose key has already created `stored`.
fn known_key(one: &NewOrder, stored: Model) -> Placement {
    let execution = if stored.id == one.id.as_uuid() {
        // Our own row: an earlier attempt was committed, but the reply to its commit was lost.
        Execution::First
    } else if stored.request_hash == request_hash(one) {
        Execution::Replayed
    } else {
        return Placement::KeyReused;
    };
    Placement::Placed(Placed {
        order: stored,
        execution,
    })
}

fn placed_event(new: &NewOrder) -> Message {
    let event = OrderPlaced {
        order_id: new.id,
        user_id: new.user_id.clone(),
        amount: new.amount,
    };
    let traceparent = new.traceparent.as_deref();
    Message::new(new.placed_event_id, &event, new.created_at, traceparent)
}

impl From<&NewOrder> for Model {
    fn from(new: &NewOrder) -> Self {
        Self {
            id: new.id.as_uuid(),
            user_id: new.user_id.to_string(),
            amount: new.amount.minor_units(),
            description: new.description.clone(),
            status: Status::New,
            reason: None,
            idempotency_key: if removed!("place.idempotency_key") {
                new.id.to_string()
            } else {
                new.idempotency_key.clone()
            },
            request_hash: request_hash(new),
            placed_event_id: new.placed_event_id.as_uuid(),
            asks: 0,
            asked_at: None,
            settlement_event_id: None,
            final_event_id: None,
            created_at: new.created_at,
            updated_at: new.created_at,
        }
    }
}

/// Hash of the fields that must be equal in two requests with the same key.
fn request_hash(new: &NewOrder) -> Vec<u8> {
    let mut hash = Sha256::new();
    hash.update(new.amount.minor_units().to_be_bytes());
    hash.update((new.user_id.as_str().len() as u64).to_be_bytes());
    hash.update(new.user_id.as_str());
    hash.update(&new.description);
    hash.finalize().to_vec()
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    fn new_order() -> NewOrder {
        NewOrder {
            id: OrderId::mint(),
            placed_event_id: EventId::mint(),
            user_id: UserId::parse("alice").unwrap(),
            amount: Amount::new(1).unwrap(),
            description: String::new(),
            idempotency_key: OrderId::mint().to_string(),
            created_at: messaging::now(),
            traceparent: None,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_waited_too_long_is_rejected() {
        // No database runs here: the request must be rejected without a query.
        let url = "postgres://127.0.0.1:1/none".to_owned().into();
        let db = Database::for_requests(&url, "test", 1).unwrap();
        let (intake, batcher) = intake();
        let mut late = Box::pin(intake.place(new_order()));
        assert!(late.as_mut().now_or_never().is_none(), "it is queued");
        tokio::time::advance(WAIT_MAX + Duration::from_millis(1)).await;
        let answer = tokio::select! {
            answer = late => answer,
            ended = batcher.run(&db, CancellationToken::new()) => panic!("{ended:?}"),
        };
        assert!(matches!(answer, Err(Error::Overloaded)), "{answer:?}");
    }

    #[tokio::test]
    async fn a_request_that_would_miss_its_deadline_is_rejected_at_once_unless_the_next_group_has_room()
     {
        let (intake, batcher) = intake();
        let place_many = |number: usize| {
            (0..number)
                .map(|_| Box::pin(intake.place(new_order())))
                .collect::<Vec<_>>()
        };
        let mut next = place_many(GROUP_MAX);
        batcher.pace.note(WAIT_MAX * 10);
        assert!(
            next.iter_mut()
                .all(|request| request.now_or_never().is_none()),
            "they go into the next group"
        );
        assert!(matches!(
            intake.place(new_order()).now_or_never(),
            Some(Err(Error::Overloaded))
        ));
        // Three groups finish in time: the one being stored, the next one, and the one after that.
        batcher.pace.note(WAIT_MAX / 3);
        let mut after = place_many(GROUP_MAX);
        assert!(
            after
                .iter_mut()
                .all(|request| request.now_or_never().is_none()),
            "they go into the group after the next one"
        );
        assert!(matches!(
            intake.place(new_order()).now_or_never(),
            Some(Err(Error::Overloaded))
        ));
    }

    #[tokio::test]
    async fn a_full_queue_rejects_requests_at_once() {
        let (intake, batcher) = intake();
        let mut waiting: Vec<_> = (0..QUEUE_MAX)
            .map(|_| Box::pin(intake.place(new_order())))
            .collect();
        assert!(
            waiting
                .iter_mut()
                .all(|request| request.now_or_never().is_none()),
            "they are queued"
        );
        assert!(matches!(
            intake.place(new_order()).now_or_never(),
            Some(Err(Error::Overloaded))
        ));
        drop(batcher);
        assert!(
            matches!(waiting.remove(0).await, Err(Error::Stopping)),
            "no request waits for ever"
        );
    }
}
