//! The chaos run: a stack of its own behind proxies, customers, and everything that can go wrong in an order that a seed
//! decides; then peace, and the question whether the promise was kept.

use std::cell::RefCell;
use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use ops::audit::{self, Beside, Databases};
use ops::history::History;
use sea_orm::{ConnectionTrait as _, DatabaseConnection, DbBackend, Statement};
use stack::seed::Seed;
use stack::testing::TestStack;
use tokio::time::Instant;

pub use report::Report;

use crate::broker::operator;
use crate::load::{Customers, Plan};
use nemesis::Nemesis;

mod nemesis;
mod report;

/// As short as makes sense: with the real ones, healing may take 10 minutes.
pub const TIMERS: [(&str, &str); 3] = [
    ("GOZON_ACK_WAIT_MS", "1000"),
    ("GOZON_ASK_AGAIN_MS", "2000"),
    ("GOZON_ASK_AGAIN_MAX_MS", "10000"),
];
/// After the last fault everything must be final within this.
pub const SETTLE_WITHIN: Duration = Duration::from_secs(60);
/// What was ordered when nothing broke any more must be final within this.
const CALM_SETTLE_WITHIN: Duration = Duration::from_secs(10);
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
const TELL_INTERVAL: Duration = Duration::from_secs(10);
const USERS: u64 = 100;

/// What to do.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Decides everything that is decided here.
    pub seed: u64,
    /// How long customers come and things break.
    pub seconds: u64,
    /// Orders over that time.
    pub orders: u64,
    /// Deposits over that time.
    pub deposits: u64,
    /// Folder with the programs.
    pub binaries: PathBuf,
    /// More environment for the services.
    pub environment: Vec<(String, String)>,
    /// Where the history goes.
    pub history: Option<PathBuf>,
    /// Only these faults, by name; all if there are none.
    pub only: Vec<String>,
}

impl Settings {
    /// The usual load for so many seconds.
    pub fn new(seed: u64, seconds: u64, binaries: PathBuf) -> Self {
        Self {
            seed,
            seconds,
            orders: seconds * 28,
            deposits: seconds * 3,
            binaries,
            environment: Vec::new(),
            history: None,
            only: Vec::new(),
        }
    }
}

/// Runs it. Call it on a runtime of one thread: processes end when the thread that started them does.
pub async fn run(settings: &Settings) -> anyhow::Result<Report> {
    let mut seed = Seed::new(settings.seed);
    let mut environment: Vec<(String, String)> = TIMERS
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec();
    environment.extend(settings.environment.iter().cloned());
    let (stack, edges) =
        TestStack::start_behind_proxies(&settings.binaries, environment, &mut seed).await?;
    let over = Duration::from_secs(settings.seconds);
    let plan = Plan {
        users: USERS,
        orders: settings.orders,
        deposits: settings.deposits,
        over,
    };
    let customers = Customers::new(&edges.front());
    let words = RefCell::new(String::new());
    let mut nemesis = Nemesis::new(stack, edges, over, &settings.only, &mut seed)?;
    let faults = nemesis.planned();
    let begun = Instant::now();

    let (shop_seed, watch_seeds) = (seed.branch(), [seed.branch(), seed.branch()]);
    let [one_seed, other_seed] = watch_seeds;
    let tell = async {
        let mut last = String::new();
        loop {
            let seen = customers.seen();
            let (done, word) = words
                .borrow()
                .split_once(' ')
                .map_or(("0".to_owned(), String::new()), |(a, b)| {
                    (a.to_owned(), b.to_owned())
                });
            let line = format!(
                "{:>4} s  {:>5}/{} orders  {:>4}/{} deposits  {:>4} unknown outcomes  {done}/{faults} faults  {word}",
                begun.elapsed().as_secs(),
                seen.orders,
                plan.orders.max(seen.orders_begun),
                seen.deposits,
                plan.deposits.max(seen.deposits_begun),
                seen.unknown
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
            let harmed = nemesis.run(begun, &words).await;
            // Whoever is not answered a minute after the last fault never will be.
            customers.close(Instant::now() + SETTLE_WITHIN);
            harmed.map(|()| Instant::now())
        };
        let (last_fault, last_customer) = tokio::join!(harm, shop);
        let last_fault = last_fault?;
        *words.borrow_mut() = format!("{faults} waiting until everything is final");
        let databases = databases(&nemesis).await?;
        // What was ordered when nothing broke any more has not so long.
        let deadline = (last_fault + SETTLE_WITHIN).max(last_customer + CALM_SETTLE_WITHIN);
        let settled = until_settled(&databases, deadline).await?;
        let settled_after = settled.then(|| last_fault.elapsed());
        customers.look_at_everything(plan.users).await?;
        anyhow::Ok((databases, settled_after))
    };
    let (databases, settled_after) = tokio::select! {
        worked = work => worked?,
        () = customers.watch(plan.users, one_seed) => unreachable!("watching never ends"),
        () = customers.watch(plan.users, other_seed) => unreachable!("watching never ends"),
        () = tell => unreachable!("telling never ends"),
    };
    eprintln!();
    let took = begun.elapsed();
    let seen = customers.seen();
    let history: History = customers.into_history();
    if let Some(path) = &settings.history {
        crate::load::write(&history, path)
            .with_context(|| format!("{} cannot be written", path.display()))?;
    }
    // Everything was final a moment ago: nothing may be late or under way any more.
    let options = audit::Options {
        grace: Duration::from_secs(2),
        late_after: Duration::ZERO,
        stuck_after: Duration::ZERO,
    };
    let broker = operator(nemesis.system()).await?;
    let beside = Beside {
        streams: Some(broker.jetstream()),
        history: Some(&history),
    };
    let audited = audit::audit_with(&databases, options, beside).await?;
    Ok(Report::new(
        settings,
        seen,
        &history,
        nemesis.fired(),
        nemesis.unexpected_ends(),
        audited,
        settled_after,
        took,
    ))
}

async fn databases(nemesis: &Nemesis) -> anyhow::Result<Databases> {
    let postgres = nemesis.system().postgres();
    Ok(Databases {
        orders: postgres.connect("orders").await?,
        payments: postgres.connect("payments").await?,
    })
}

/// Waits until no order is NEW and nothing waits to be published.
async fn until_settled(databases: &Databases, deadline: Instant) -> anyhow::Result<bool> {
    let waits = "SELECT 1 FROM outbox WHERE published_at IS NULL LIMIT 1";
    loop {
        let open = any(
            &databases.orders,
            "SELECT 1 FROM orders WHERE status = 'NEW' LIMIT 1",
        )
        .await?
            || any(&databases.orders, waits).await?
            || any(&databases.payments, waits).await?;
        if !open || Instant::now() > deadline {
            return Ok(!open);
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

async fn any(db: &DatabaseConnection, query: &str) -> anyhow::Result<bool> {
    Ok(db
        .query_one_raw(Statement::from_string(DbBackend::Postgres, query))
        .await?
        .is_some())
}

/// On a terminal one line that changes; elsewhere a line now and then.
fn show(line: &str, last: &mut String) {
    let mut out = std::io::stderr();
    // Whoever does not listen misses nothing.
    let _ = match out.is_terminal() {
        true => write!(out, "\r{line:<width$}", width = last.len()),
        false => writeln!(out, "{line}"),
    };
    let _ = out.flush();
    line.clone_into(last);
}
