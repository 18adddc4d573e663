//! The chaos run: a stack behind proxies, customers, and faults in an order that a seed determines;
//! then no more faults, and the check of the promise.

use std::cell::RefCell;
use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use anyhow::Context as _;
use e2e::load::{self, Customers, Plan};
use e2e::{SHORT_TIMERS, checks};
use ops::history::History;
use stack::seed::Seed;
use stack::testing::TestStack;
use tokio::time::Instant;

use crate::nemesis::Nemesis;
use crate::report::Report;
use crate::settings::{SETTLE_WITHIN, Settings};

/// Orders placed after the last fault must be final within this.
const CALM_SETTLE_WITHIN: Duration = Duration::from_secs(10);
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
const TELL_INTERVAL: Duration = Duration::from_secs(10);
const USERS: u64 = 100;

/// Needs a runtime with one thread: the kernel ends processes when the thread that started them
/// ends.
pub(crate) async fn run(settings: &Settings) -> anyhow::Result<Report> {
    let mut seed = Seed::new(settings.seed);
    let mut environment: Vec<(String, String)> = SHORT_TIMERS
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec();
    environment.extend(settings.environment.iter().cloned());
    let (stack, proxies) =
        TestStack::start_behind_proxies(&settings.binaries, environment, &mut seed).await?;
    let over = Duration::from_secs(settings.seconds);
    let plan = Plan {
        users: USERS,
        orders: settings.orders,
        deposits: settings.deposits,
        over,
    };
    let customers = Customers::new(&proxies.client_url());
    let status = RefCell::new(String::new());
    let mut nemesis = Nemesis::new(stack, proxies, over, &settings.only, &mut seed)?;
    let faults = nemesis.planned();
    let begun = Instant::now();

    let (shop_seed, watch_seeds) = (seed.fork(), [seed.fork(), seed.fork()]);
    let [one_seed, other_seed] = watch_seeds;
    let report_progress = async {
        let mut last = String::new();
        loop {
            let counts = customers.counts();
            let (done, current) = status
                .borrow()
                .split_once(' ')
                .map_or(("0".to_owned(), String::new()), |(a, b)| {
                    (a.to_owned(), b.to_owned())
                });
            let line = format!(
                "{:>4} s  {:>5}/{} orders  {:>4}/{} deposits  {:>4} unknown outcomes  {done}/{faults} faults  {current}",
                begun.elapsed().as_secs(),
                counts.orders,
                plan.orders.max(counts.orders_begun),
                counts.deposits,
                plan.deposits.max(counts.deposits_begun),
                counts.unknown
            );
            show(&line, &mut last);
            tokio::time::sleep(if std::io::stderr().is_terminal() {
                LOOK_INTERVAL * 5
            } else {
                TELL_INTERVAL
            })
            .await;
        }
    };
    let work = async {
        let shop = async {
            customers.shop(plan, shop_seed).await;
            Instant::now()
        };
        let harm = async {
            let injected = nemesis.run(begun, &status).await;
            // A request without an answer one minute after the last fault has failed.
            customers.close(Instant::now() + SETTLE_WITHIN);
            injected.map(|()| Instant::now())
        };
        let (last_fault, last_customer) = tokio::join!(harm, shop);
        let last_fault = last_fault?;
        *status.borrow_mut() = format!("{faults} waiting until everything is final");
        let databases = checks::databases(nemesis.system()).await?;
        // Orders placed after the last fault have less time.
        let deadline = (last_fault + SETTLE_WITHIN).max(last_customer + CALM_SETTLE_WITHIN);
        let settled = checks::until_settled(&databases, deadline).await?;
        let settled_after = settled.then(|| last_fault.elapsed());
        customers.read_everything(plan.users).await?;
        anyhow::Ok((databases, settled_after))
    };
    let (databases, settled_after) = tokio::select! {
        worked = work => worked?,
        () = customers.watch(plan.users, one_seed) => unreachable!("watching never ends"),
        () = customers.watch(plan.users, other_seed) => unreachable!("watching never ends"),
        () = report_progress => unreachable!("reporting never ends"),
    };
    eprintln!();
    let took = begun.elapsed();
    let counts = customers.counts();
    let history: History = customers.into_history();
    if let Some(path) = &settings.history {
        load::write(&history, path)
            .with_context(|| format!("{} cannot be written", path.display()))?;
    }
    let grace = Duration::from_secs(2);
    let audited =
        checks::audit_settled(nemesis.system(), &databases, grace, Some(&history)).await?;
    Ok(Report::new(
        settings,
        counts,
        &history,
        nemesis.fired(),
        nemesis.unexpected_exits(),
        audited,
        settled_after,
        took,
    ))
}

/// On a terminal, overwrites one line; elsewhere, prints a line from time to time.
fn show(line: &str, last: &mut String) {
    let mut out = std::io::stderr();
    // Progress is not important: errors are ignored.
    let _ = match out.is_terminal() {
        true => write!(out, "\r{line:<width$}", width = last.len()),
        false => writeln!(out, "{line}"),
    };
    let _ = out.flush();
    line.clone_into(last);
}
