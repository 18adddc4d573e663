//! A row that is not to be had delays only the orders of its account.
//!
//! `GOZON_LONG=1` runs the full form: 60 seconds, 3,000 messages for the locked account.

use std::time::Duration;

use futures_util::future::join_all;
use sea_orm::{ConnectionTrait as _, TransactionTrait as _};
use stack::proxy::{Protocol, Proxy};
use stack::seed::Seed;
use stack::testing::eventually;
use tokio::time::Instant;

use crate::harness::{Payments, Request, SOON, request};

/// The lock delays orders of other accounts by less than this, 99 of 100 of them.
const OTHERS_WITHIN: Duration = Duration::from_millis(250);
/// The locked account's orders are decided within this after the release.
const RELEASED_WITHIN: Duration = Duration::from_secs(2);
const OTHERS: usize = 20;

fn is_long() -> bool {
    std::env::var_os("GOZON_LONG").is_some()
}

/// Publishes 100 orders a second for other accounts, and returns how long each took to be decided,
/// the slowest last.
async fn others(payments: &Payments, seconds: usize) -> Vec<Duration> {
    let begun = Instant::now();
    let orders = (0..seconds * 100).map(|number| async move {
        let due = begun + Duration::from_millis(10) * u32::try_from(number).unwrap();
        tokio::time::sleep_until(due).await;
        let order = request(&format!("other-{}", number % OTHERS), 1);
        payments.publish(&order).await;
        payments.decision(&order).await;
        due.elapsed()
    });
    let mut took = join_all(orders).await;
    took.sort();
    took
}

fn percentile_99(took: &[Duration]) -> Duration {
    took[took.len() - 1 - took.len() / 100]
}

async fn open_accounts(payments: &Payments) {
    payments.open_account("alice", 100).await;
    for number in 0..OTHERS {
        let user = format!("other-{number}");
        payments.open_account(&user, 1_000_000).await;
    }
}

/// The account of alice has money for the first 100 of these, and for no other.
async fn assert_decided_in_order(payments: &Payments, orders: &[Request]) {
    let undecided = "SELECT count(*) FROM payments WHERE user_id = 'alice'";
    eventually(
        "the orders of alice are decided",
        RELEASED_WITHIN,
        async || (payments.count(undecided).await == orders.len() as i64).then_some(()),
    )
    .await;
    for (number, order) in orders.iter().enumerate() {
        let outcome = payments.decision(order).await.outcome;
        assert_eq!(
            outcome == "paid",
            number < 100,
            "order {number} is {outcome}"
        );
    }
}

async fn one_locked_account(payments: &Payments) {
    open_accounts(payments).await;
    let (seconds, messages) = if is_long() { (60, 3000) } else { (3, 300) };
    let usual = percentile_99(&others(payments, 1).await);
    let lock = payments.another_connection().await.begin().await.unwrap();
    lock.execute_unprepared("SELECT 1 FROM accounts WHERE user_id = 'alice' FOR UPDATE")
        .await
        .unwrap();
    let orders: Vec<Request> = (0..messages).map(|_| request("alice", 1)).collect();
    let locked = async {
        for order in &orders {
            payments.publish(order).await;
        }
        payments.deposit("other-1", 1).await;
    };
    let (took, ()) = tokio::join!(others(payments, seconds), locked);
    let worst = percentile_99(&took);
    println!(
        "usual p99 {usual:?}; locked: p50 {:?}, p99 {worst:?}",
        took[took.len() / 2]
    );
    assert!(
        worst < usual + OTHERS_WITHIN,
        "p99 of the other accounts: {worst:?}"
    );
    lock.rollback().await.unwrap();

    let released = Instant::now();
    assert_decided_in_order(payments, &orders).await;
    println!("decided {:?} after the release", released.elapsed());
    payments.assert_books_balance().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f65_a_locked_account_delays_no_other_and_is_served_in_order_after() {
    let payments = Payments::start().await;
    one_locked_account(&payments).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f65_a_locked_account_delays_no_other_on_two_replicas() {
    let payments = Payments::start().await;
    let second = payments.replica().await;
    one_locked_account(&payments).await;
    second.stop().await.unwrap();
}

#[tokio::test]
async fn f65_a_row_that_is_refused_every_time_delays_no_other() {
    let payments = Payments::start().await;
    open_accounts(&payments).await;
    payments
        .execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN
                 RAISE EXCEPTION 'refused by a test' USING ERRCODE = 'serialization_failure';
             END $$;
             CREATE TRIGGER refuse BEFORE INSERT ON payments FOR EACH ROW
                 WHEN (NEW.user_id = 'alice') EXECUTE FUNCTION refuse();",
        )
        .await;
    let refused = request("alice", 1);
    payments.publish(&refused).await;
    let took = others(&payments, 1).await;
    // The first batch with it is tried again, in the hope that it was a deadlock.
    let worst = percentile_99(&took);
    assert!(
        worst < 2 * OTHERS_WITHIN,
        "p99 of the other accounts: {worst:?}"
    );
    let deferred = "SELECT count(*) FROM deferred WHERE ordering_key = 'alice'";
    assert_eq!(payments.count(deferred).await, 1);

    payments.execute("DROP TRIGGER refuse ON payments").await;
    assert_eq!(payments.decision(&refused).await.outcome, "paid");
    assert_eq!(payments.count("SELECT count(*) FROM deferred").await, 0);
}

#[tokio::test]
async fn f65_poison_among_the_messages_of_a_locked_account_becomes_a_dead_letter() {
    let payments = Payments::start().await;
    payments.open_account("alice", 100).await;
    let orders = [request("alice", 1), request("alice", 1)];
    let held = payments
        .while_blocked(3, async || {
            payments.publish(&orders[0]).await;
            let poison = request("alice", 1);
            payments.publish_raw(poison.headers(), "not JSON").await;
            payments.publish(&orders[1]).await;
        })
        .await;
    let lock = payments.another_connection().await.begin().await.unwrap();
    lock.execute_unprepared("SELECT 1 FROM accounts FOR UPDATE")
        .await
        .unwrap();
    held.release().await.unwrap();
    let letters = "SELECT count(*) FROM dead_letters";
    let deferred = "SELECT count(*) FROM deferred";
    eventually("all three are stored", SOON, async || {
        let stored = (
            payments.count(letters).await,
            payments.count(deferred).await,
        );
        (stored == (1, 2)).then_some(())
    })
    .await;
    lock.rollback().await.unwrap();
    for order in &orders {
        assert_eq!(payments.decision(order).await.outcome, "paid");
    }
}

#[tokio::test]
async fn f65_a_batch_that_a_replica_cannot_store_is_stored_by_another() {
    // The broker would wait ten minutes for the ack.
    let payments = Payments::start_with_ack_wait(10 * 60 * 1000).await;
    payments.open_account("alice", 100).await;
    let port = payments.database_port();
    let proxy = Proxy::open(Protocol::Plain, port, Seed::new(1))
        .await
        .unwrap();
    let cut_off = payments.replica_at(proxy.port()).await;
    proxy.black_hole();
    // Enough that the replica that is cut off gets some.
    let orders: Vec<Request> = (0..20).map(|_| request("alice", 1)).collect();
    for order in &orders {
        payments.publish(order).await;
    }
    for order in &orders {
        assert_eq!(payments.decision(order).await.outcome, "paid");
    }
    let redelivered = "SELECT count(*) FROM inbox WHERE delivered > 1";
    let redelivered = eventually("it had some of them", SOON, async || {
        Some(payments.count(redelivered).await).filter(|number| *number > 0)
    });
    redelivered.await;
    cut_off.crash().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f65_two_replicas_on_one_account_are_about_as_fast_as_one() {
    let (number, at_least) = if is_long() {
        (20_000, 0.9)
    } else {
        (6000, 0.6)
    };
    let mut payments = Payments::start().await;
    payments.open_account("alice", 1_000_000).await;
    let mut took = Vec::new();
    for replicas in [1, 2] {
        payments.stop().await;
        let decided = payments.decisions().await;
        payments.publish_many("alice", number).await;
        let begun = Instant::now();
        payments.run().await;
        let second = match replicas {
            1 => None,
            _ => Some(payments.replica().await),
        };
        eventually("all orders are decided", 10 * SOON, async || {
            (payments.decisions().await == decided + number).then_some(())
        })
        .await;
        took.push(begun.elapsed().as_secs_f64());
        if let Some(second) = second {
            second.stop().await.unwrap();
        }
    }
    let ratio = took[0] / took[1];
    println!(
        "one replica {:.1} s, two {:.1} s, ratio {ratio:.2}",
        took[0], took[1]
    );
    assert!(ratio > at_least, "{ratio}");
    payments.assert_books_balance().await;
}
