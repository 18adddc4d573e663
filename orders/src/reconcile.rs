//! Asks again for the payment of orders that stay NEW, for ever: whatever the broker loses, no order is left hanging.
//!
//! Only asking is done here. Whether an order was paid meanwhile is known to payments alone, which answers a re-ask with
//! the decision it has stored, or decides now. Everything that decides when to ask is in the database; a process that
//! dies forgets nothing.

use std::time::Duration;

use anyhow::Context as _;
use failpoint::{failpoint, removed};
use messaging::db::{self, sql};
use messaging::losses::Losses;
use messaging::outbox::{self, Message};
use messaging::outlet::Outlet;
use sea_orm::{ConnectionTrait as _, DatabaseConnection, DbErr, TransactionTrait as _};
use shared_contracts::{Amount, Event as _, EventId, OrderId, OrderPlaced, UserId};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::entity::order::{self, AskAgain, Model};
use crate::measured;

/// How often orders that are due are looked for; also the second of "so many per second".
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// A look that hangs (a connection into nothing) is given up and taken again on another connection.
const STEP_TIMEOUT: Duration = Duration::from_secs(20);
/// Any number: of several replicas, the one that holds this advisory lock asks.
const RECONCILER_LOCK: i64 = 7_011_988;

/// The reconciler of one process.
pub(crate) struct Reconciler {
    /// Pool of the flow, not of the HTTP side.
    pub(crate) db: DatabaseConnection,
    pub(crate) again: AskAgain,
    /// Told by relay and consumer when the broker is found to have lost what it had acknowledged.
    pub(crate) losses: Losses,
    /// To the relay.
    pub(crate) outlet: Outlet,
}

impl Reconciler {
    /// Asks until `shutdown`.
    pub(crate) async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        let mut losses = self.losses.watch();
        let mut noted = None;
        let mut pause = LOOK_INTERVAL;
        while shutdown
            .run_until_cancelled(tokio::time::timeout(pause, losses.changed()))
            .await
            .is_some()
        {
            let latest = *losses.borrow_and_update();
            let begun = Instant::now();
            match db::within(STEP_TIMEOUT, self.step(latest.filter(|_| latest > noted))).await {
                Ok(asked) => {
                    noted = latest;
                    if asked > 0 {
                        measured::asked_again(asked);
                        info!(orders = asked, "Orders that stayed NEW are asked for again");
                    }
                }
                Err(error) => warn!(
                    error = format!("{error:#}"),
                    "Orders that stay NEW could not be looked for; trying again"
                ),
            }
            // A look that takes long (very many orders are NEW) is taken less often.
            pause = LOOK_INTERVAL.max(begun.elapsed() * 10);
        }
        Ok(())
    }

    /// One look: in one transaction, the orders that are due and a new request for each.
    async fn step(&self, loss: Option<Instant>) -> anyhow::Result<usize> {
        if let Some(before) = loss.filter(|_| !removed!("reconcile.lost_at")) {
            self.note(before)
                .await
                .context("that the broker lost messages could not be noted")?;
        }
        // Most looks find that nothing is NEW.
        if !order::something_is_new(&self.db).await? {
            return Ok(0);
        }
        let txn = self.db.begin().await?;
        let lock = txn
            .query_one_raw(sql(
                "SELECT pg_try_advisory_xact_lock($1) AS mine",
                [RECONCILER_LOCK.into()],
            ))
            .await?;
        let mine = lock.is_some_and(|row| row.try_get("", "mine").unwrap_or(false));
        if !mine || outbox::is_behind(&txn, OrderPlaced::SUBJECT, self.again.after).await? {
            txn.rollback().await?;
            return Ok(0);
        }
        let due = order::lock_due(&txn, self.again).await?;
        if due.is_empty() || removed!("reconcile.ask_again") {
            txn.rollback().await?;
            return Ok(0);
        }
        failpoint!("reconcile.after_lock")?;
        let now = db::now();
        let mut requests = Vec::with_capacity(due.len());
        for order in &due {
            match request(order, now) {
                Ok(request) => requests.push(request),
                // Somebody edited the table. It must not keep the others from being asked for.
                Err(error) => {
                    error!(order.id = %order.id, error = format!("{error:#}"), "An order cannot be asked for again")
                }
            }
        }
        let counted = order::count_ask(&txn, due.iter().map(|order| order.id).collect()).await?;
        anyhow::ensure!(
            counted == due.len() as u64,
            "orders that were locked while NEW are not"
        );
        let enqueued = outbox::enqueue(&txn, requests).await?;
        failpoint!("reconcile.before_commit")?;
        txn.commit().await?;
        failpoint!("reconcile.after_commit")?;
        self.outlet.hand_over(enqueued);
        Ok(due.len())
    }

    /// Notes for all replicas that what was published before may be lost, by the database's clock, like the times it is
    /// compared with.
    async fn note(&self, before: Instant) -> Result<(), DbErr> {
        // Waiting for a connection is over when the age is taken.
        let txn = self.db.begin().await?;
        let age = before.elapsed().as_secs_f64();
        let query = "UPDATE reconciliation SET lost_at = greatest(lost_at, clock_timestamp() - make_interval(secs => $1))";
        txn.execute_raw(sql(query, [age.into()])).await?;
        txn.commit().await
    }
}

/// The next request for an order: the same fact under the next number, so that the broker does not swallow it.
fn request(order: &Model, now: time::OffsetDateTime) -> anyhow::Result<Message> {
    let event = OrderPlaced {
        order_id: OrderId::from(order.id),
        user_id: UserId::parse(order.user_id.as_str())?,
        amount: Amount::new(order.amount)?,
    };
    let ask = u32::try_from(order.asks)?.saturating_add(1);
    Ok(Message::nth(
        EventId::from(order.placed_event_id),
        ask,
        &event,
        now,
        None,
    ))
}
