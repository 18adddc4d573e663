//! Where requests wait to be stored: whatever queued while the last transaction ran goes into the next one. No request
//! is delayed to fill a group; under load groups form by themselves, and the database commits once for all of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use messaging::db;
use messaging::outlet::Outlet;
use sea_orm::{DatabaseConnection, DbErr};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::error::Error;
use crate::order::{self, NewOrder, Placed};

/// Orders in one transaction. Larger ones only add latency.
const GROUP_MAX: usize = 200;
/// Requests that may wait. A queue this long takes a healthy database well below a second; a longer one only hides that
/// it is not healthy.
const QUEUE_MAX: usize = 2000;
/// A request that waited this long is turned away: whoever sent it gives up soon, and storing it then helps nobody. One
/// that would be answered later than this is not let in at all.
const WAIT_MAX: Duration = Duration::from_secs(2);
/// After a shutdown begins, requests that are still open get this long.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(6);

struct Ticket {
    new: NewOrder,
    came: Instant,
    answer: oneshot::Sender<Result<Placed, Error>>,
}

/// The door of the queue, cheap to clone.
#[derive(Clone)]
pub(crate) struct Intake {
    queue: mpsc::Sender<Ticket>,
    pace: Pace,
}

/// The one who works it off.
pub(crate) struct Clerk {
    queue: mpsc::Receiver<Ticket>,
    pace: Pace,
}

/// How long the last group took to store, in microseconds.
#[derive(Clone, Default)]
struct Pace(Arc<AtomicU64>);

impl Pace {
    fn note(&self, took: Duration) {
        self.0.store(
            u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
            Ordering::Relaxed,
        );
    }

    /// Whether somebody with so many ahead is answered in time, as far as anyone can tell: after the group that is being
    /// stored, the full ones ahead, and its own. Who goes into the very next group is always let in, or a slow group would
    /// be the last that is ever stored.
    fn is_in_time(&self, ahead: usize) -> bool {
        let full = ahead / GROUP_MAX;
        let groups = u32::try_from(full).unwrap_or(u32::MAX).saturating_add(2);
        full == 0
            || Duration::from_micros(self.0.load(Ordering::Relaxed)).saturating_mul(groups)
                <= WAIT_MAX
    }
}

/// An empty queue.
pub(crate) fn open() -> (Intake, Clerk) {
    let (sender, receiver) = mpsc::channel(QUEUE_MAX);
    let pace = Pace::default();
    (
        Intake {
            queue: sender,
            pace: pace.clone(),
        },
        Clerk {
            queue: receiver,
            pace,
        },
    )
}

impl Intake {
    /// Stores an order together with whatever else is waiting.
    pub(crate) async fn place(&self, new: NewOrder) -> Result<Placed, Error> {
        if !self
            .pace
            .is_in_time(self.queue.max_capacity() - self.queue.capacity())
        {
            return Err(Error::Overloaded);
        }
        let (answer, answered) = oneshot::channel();
        self.queue
            .try_send(Ticket {
                new,
                came: Instant::now(),
                answer,
            })
            .map_err(|_| Error::Overloaded)?;
        // The clerk drops a ticket unanswered only if the process ends meanwhile.
        answered.await.unwrap_or(Err(Error::Stopping))
    }
}

impl Clerk {
    /// Works until nobody can come any more.
    pub(crate) async fn run(
        mut self,
        db: &DatabaseConnection,
        outlet: Outlet,
        shutdown: CancellationToken,
    ) -> anyhow::Result<()> {
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
            store(db, &outlet, group.drain(..), &self.pace).await;
        }
    }
}

async fn store(
    db: &DatabaseConnection,
    outlet: &Outlet,
    group: impl Iterator<Item = Ticket>,
    pace: &Pace,
) {
    let mut new = Vec::with_capacity(GROUP_MAX);
    let mut answers = Vec::with_capacity(GROUP_MAX);
    for ticket in group {
        if ticket.came.elapsed() > WAIT_MAX {
            // Whoever asked may have gone already, as below.
            let _ = ticket.answer.send(Err(Error::Overloaded));
        } else if !ticket.answer.is_closed() {
            new.push(ticket.new);
            answers.push(ticket.answer);
        }
    }
    if new.is_empty() {
        return;
    }
    let begun = Instant::now();
    let placed = order::place(db, outlet, &new).await;
    pace.note(begun.elapsed());
    match placed {
        Ok(results) => {
            for (answer, result) in answers.into_iter().zip(results) {
                // Whoever asked may have gone; the order is stored, and its key tells.
                let _ = answer.send(result);
            }
        }
        // What the database refuses every time, or a key that somebody else holds, must not hurt the others.
        Err(Error::Database(error)) if new.len() > 1 && concerns_one(&error) => {
            warn!(orders = new.len(), error = %error, "A group of orders was refused; one by one");
            for (answer, one) in answers.into_iter().zip(&new) {
                let result = match order::place(db, outlet, std::slice::from_ref(one)).await {
                    Ok(results) => results
                        .into_iter()
                        .next()
                        .unwrap_or(Err(Error::OrderNotFound)),
                    Err(error) => Err(error),
                };
                // As above.
                let _ = answer.send(result);
            }
        }
        Err(error) => {
            for answer in answers {
                // As above.
                let _ = answer.send(Err(error.again()));
            }
        }
    }
}

/// Whether one order of a group is to blame, and not the database as a whole.
fn concerns_one(error: &DbErr) -> bool {
    !db::is_transient(error) || db::is_lock_timeout(error)
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;
    use futures_util::future::join_all;
    use sea_orm::{ConnectionTrait as _, DbBackend, Statement, TransactionTrait as _};
    use service_kit::idempotency::Delivery;
    use shared_contracts::{Amount, EventId, OrderId, UserId};

    use super::*;

    fn order() -> NewOrder {
        NewOrder {
            id: OrderId::mint(),
            placed_event_id: EventId::mint(),
            user_id: UserId::parse("alice").unwrap(),
            amount: Amount::new(1).unwrap(),
            description: String::new(),
            idempotency_key: OrderId::mint().to_string(),
            created_at: messaging::db::now(),
            traceparent: None,
        }
    }

    #[tokio::test]
    async fn what_waits_is_stored_in_one_transaction_and_everyone_gets_its_own_answer() {
        let database = stack::testing::TestDatabase::fresh().await.unwrap();
        let db = db::connect(&database.url, "test", db::Role::Http, 3)
            .await
            .unwrap();
        messaging::db::migrate::<crate::migration::Migrator>(&db)
            .await
            .unwrap();
        let (intake, clerk) = open();
        let first = NewOrder {
            idempotency_key: "twin".to_owned(),
            ..order()
        };
        let twin = NewOrder {
            id: OrderId::mint(),
            placed_event_id: EventId::mint(),
            ..first.clone()
        };
        let impostor = NewOrder {
            amount: Amount::new(2).unwrap(),
            ..twin.clone()
        };
        let mut all: Vec<NewOrder> = (0..30).map(|_| order()).collect();
        all.extend([
            first.clone(),
            twin.clone(),
            NewOrder {
                id: OrderId::mint(),
                ..twin
            },
            impostor,
        ]);

        let mut waiting: Vec<_> = all
            .iter()
            .map(|new| Box::pin(intake.place(new.clone())))
            .collect();
        assert!(
            waiting
                .iter_mut()
                .all(|request| request.now_or_never().is_none()),
            "all wait before the clerk begins"
        );
        let shutdown = CancellationToken::new();
        let answers = tokio::select! {
            answers = join_all(waiting) => answers,
            ended = clerk.run(&db, Outlet::default(), shutdown) => panic!("{ended:?}"),
        };
        for (new, answer) in all.iter().zip(&answers).take(31) {
            let placed = answer.as_ref().unwrap();
            assert_eq!(
                (placed.order.id, placed.delivery),
                (new.id.as_uuid(), Delivery::First)
            );
        }
        for twin in &answers[31..33] {
            let placed = twin.as_ref().unwrap();
            assert_eq!(
                (placed.order.id, placed.delivery),
                (first.id.as_uuid(), Delivery::Replayed)
            );
        }
        assert!(matches!(answers[33], Err(Error::KeyReused)));
        let query = "SELECT count(*) || ' in ' || count(DISTINCT created_at) FROM outbox";
        let row = db
            .query_one_raw(Statement::from_string(DbBackend::Postgres, query))
            .await
            .unwrap()
            .unwrap();
        assert_eq!(row.try_get_by_index::<String>(0).unwrap(), "31 in 1");
    }

    #[tokio::test]
    async fn a_key_that_somebody_else_is_storing_holds_up_its_own_order_only() {
        let database = stack::testing::TestDatabase::fresh().await.unwrap();
        let db = db::connect(&database.url, "test", db::Role::Http, 3)
            .await
            .unwrap();
        messaging::db::migrate::<crate::migration::Migrator>(&db)
            .await
            .unwrap();
        let held = order();
        let holder = db.begin().await.unwrap();
        crate::entity::order::insert_new(&holder, vec![(&held).into()])
            .await
            .unwrap();

        let (intake, clerk) = open();
        let all = [
            order(),
            NewOrder {
                id: OrderId::mint(),
                placed_event_id: EventId::mint(),
                ..held.clone()
            },
            order(),
        ];
        let answers = join_all(all.iter().map(|new| intake.place(new.clone())));
        let answers = tokio::select! {
            answers = answers => answers,
            ended = clerk.run(&db, Outlet::default(), CancellationToken::new()) => panic!("{ended:?}"),
        };
        assert!(answers[0].is_ok() && answers[2].is_ok(), "{answers:?}");
        assert!(
            matches!(&answers[1], Err(Error::Database(error)) if db::is_lock_timeout(error)),
            "{answers:?}"
        );
        holder.rollback().await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn who_waited_too_long_is_turned_away() {
        // No database: it must not be asked.
        let db = db::connect("postgres://127.0.0.1:1/none", "test", db::Role::Http, 1)
            .await
            .unwrap();
        let (intake, clerk) = open();
        let mut late = Box::pin(intake.place(order()));
        assert!(late.as_mut().now_or_never().is_none(), "it waits");
        tokio::time::advance(WAIT_MAX + Duration::from_millis(1)).await;
        let answer = tokio::select! {
            answer = late => answer,
            ended = clerk.run(&db, Outlet::default(), CancellationToken::new()) => panic!("{ended:?}"),
        };
        assert!(matches!(answer, Err(Error::Overloaded)), "{answer:?}");
    }

    #[tokio::test]
    async fn an_order_whose_client_has_gone_before_it_was_begun_is_not_stored() {
        let database = stack::testing::TestDatabase::fresh().await.unwrap();
        let db = db::connect(&database.url, "test", db::Role::Http, 2)
            .await
            .unwrap();
        messaging::db::migrate::<crate::migration::Migrator>(&db)
            .await
            .unwrap();
        let (intake, clerk) = open();
        let mut gone = Box::pin(intake.place(order()));
        assert!(gone.as_mut().now_or_never().is_none(), "it waits");
        drop(gone);
        let placed = tokio::select! {
            placed = intake.place(order()) => placed.unwrap(),
            ended = clerk.run(&db, Outlet::default(), CancellationToken::new()) => panic!("{ended:?}"),
        };
        let row = db
            .query_one_raw(Statement::from_string(
                DbBackend::Postgres,
                "SELECT id FROM orders",
            ))
            .await
            .unwrap()
            .unwrap();
        assert_eq!(
            row.try_get_by_index::<uuid::Uuid>(0).unwrap(),
            placed.order.id,
            "the only one"
        );
    }

    #[tokio::test]
    async fn who_would_be_answered_too_late_is_turned_away_at_once_but_never_from_the_next_group() {
        let (intake, clerk) = open();
        let come = |number: usize| {
            (0..number)
                .map(|_| Box::pin(intake.place(order())))
                .collect::<Vec<_>>()
        };
        let mut next = come(GROUP_MAX);
        clerk.pace.note(WAIT_MAX * 10);
        assert!(
            next.iter_mut()
                .all(|request| request.now_or_never().is_none()),
            "they go into the next group"
        );
        assert!(matches!(
            intake.place(order()).now_or_never(),
            Some(Err(Error::Overloaded))
        ));
        // The group that is being stored, the next one, and the one after that.
        clerk.pace.note(WAIT_MAX / 3);
        let mut after = come(GROUP_MAX);
        assert!(
            after
                .iter_mut()
                .all(|request| request.now_or_never().is_none()),
            "two groups are stored before them in time"
        );
        assert!(matches!(
            intake.place(order()).now_or_never(),
            Some(Err(Error::Overloaded))
        ));
    }

    #[tokio::test]
    async fn a_full_queue_turns_requests_away_at_once() {
        let (intake, clerk) = open();
        let mut waiting: Vec<_> = (0..QUEUE_MAX)
            .map(|_| Box::pin(intake.place(order())))
            .collect();
        assert!(
            waiting
                .iter_mut()
                .all(|request| request.now_or_never().is_none()),
            "these wait"
        );
        assert!(matches!(
            intake.place(order()).now_or_never(),
            Some(Err(Error::Overloaded))
        ));
        drop(clerk);
        assert!(
            matches!(waiting.remove(0).await, Err(Error::Stopping)),
            "nobody waits for ever"
        );
    }
}
