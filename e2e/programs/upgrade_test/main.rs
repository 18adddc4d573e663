//! `./dev upgrade-test OLD`: builds an older commit, puts load on it, and replaces its processes
//! one by one with this version. At the end every order must be final, without dead letters and
//! findings.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use clap::Parser;
use e2e::checks;
use e2e::load::{Customers, Plan};
use ops::audit::Databases;
use ops::history::History;
use sea_orm::{ConnectionTrait as _, DbBackend, Statement};
use serde_json::Value;
use stack::Service;
use stack::seed::Seed;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::time::Instant;

use old::Old;
use upgrade::{StopBy, Upgrade};

mod balancer;
mod old;
mod upgrade;

const PLAN: Plan = Plan {
    users: 50,
    orders: 300,
    deposits: 60,
    over: Duration::from_secs(10),
};
/// This many more orders must become final after each step, before the next one.
const ORDERS_PER_STEP: u64 = 80;
/// Orders placed while no replica of payments runs.
const BACKLOG: u64 = 50;
const STEP_WITHIN: Duration = Duration::from_secs(60);
const SETTLED_WITHIN: Duration = Duration::from_secs(60);
/// Requests of all versions that are repeated at the end, under their keys.
const REPEATED: usize = 300;
const FAILURES_SHOWN: usize = 20;
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// The broker's configuration of this version.
const NATS_CONFIGURATION: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../nats/single.conf");

/// Upgrades a system under load from an older commit to this one, replica by replica. Exit code 0
/// only if every order is final and the audit finds nothing.
#[derive(Parser)]
struct Arguments {
    /// The older commit: a hash, tag or branch.
    old: String,
    /// Determines the requests of the customers.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

// One thread: the kernel ends the processes of a stack when the thread that started them ends.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run(Arguments::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let program = std::env::current_exe()?;
    let binaries = program.parent().context("this program is in a folder")?;
    let target = binaries.parent().context("a target folder has profiles")?;
    let old = Old::build(&arguments.old, &target.join("upgrade"))?;

    let mut upgrade = Upgrade::start(&old).await?;
    let result = test(&mut upgrade, &old, binaries, arguments.seed).await;
    if result.is_err() {
        let logs = upgrade.keep_logs(&target.join("upgrade/logs"))?;
        eprintln!("Logs: {}", logs.display());
    }
    result
}

async fn test(upgrade: &mut Upgrade, old: &Old, binaries: &Path, seed: u64) -> anyhow::Result<()> {
    let mut seed = Seed::new(seed);
    let databases = checks::databases(upgrade.system()).await?;
    let customers = Customers::new(&upgrade.system().address("gateway"));
    let steps = Steps {
        begun: Instant::now(),
        customers: &customers,
        databases: &databases,
    };
    let (shop_seed, watch_seed) = (seed.fork(), seed.fork());
    let work = async {
        let replacing = async {
            let replaced = steps.replace_all(upgrade, old, binaries).await;
            customers.close(Instant::now() + SETTLED_WITHIN);
            replaced
        };
        let (replaced, ()) = tokio::join!(replacing, customers.shop(PLAN, shop_seed));
        replaced?;
        let deadline = Instant::now() + SETTLED_WITHIN;
        let settled = checks::until_settled(&databases, deadline).await?;
        customers.repeat(REPEATED).await;
        customers.read_everything(PLAN.users).await?;
        anyhow::Ok(settled)
    };
    let settled = tokio::select! {
        worked = work => worked?,
        () = customers.watch(PLAN.users, watch_seed) => unreachable!("watching never ends"),
    };
    upgrade.ensure_all_run()?;
    let counts = customers.counts();
    let history = with_six_digits(customers.into_history());
    let grace = Duration::from_secs(2);
    let report = checks::audit_settled(upgrade.system(), &databases, grace, Some(&history)).await?;

    let mut failures: Vec<String> = report
        .findings
        .iter()
        .map(|finding| format!("{} {}: {}", finding.kind, finding.id, finding.detail))
        .collect();
    failures.extend(
        report
            .not_looked_at
            .iter()
            .map(|what| format!("not checked: {what}")),
    );
    if !settled {
        failures.push(format!(
            "{SETTLED_WITHIN:?} after the last request, an order is NEW or an event is unpublished"
        ));
    }
    if (counts.orders, counts.deposits) != (counts.orders_begun, counts.deposits_begun) {
        failures.push(format!("not every request was done in the end: {counts:?}"));
    }
    let errors = internal_errors(&history);
    if errors > 0 {
        failures.push(format!("{errors} requests were answered with 500"));
    }
    println!(
        "\n{} orders {:?}, {} deposits, {} requests, {} of them with an unknown outcome and retried.",
        report.orders,
        report.by_status,
        counts.deposits,
        history.exchanges.len(),
        counts.unknown
    );
    for failure in failures.iter().take(FAILURES_SHOWN) {
        println!("  {failure}");
    }
    if failures.len() > FAILURES_SHOWN {
        println!("  and {} more", failures.len() - FAILURES_SHOWN);
    }
    ensure!(
        failures.is_empty(),
        "the upgrade from {} broke something",
        old.commit
    );
    println!(
        "Upgraded from {}: every order is final, no dead letter, the audit finds nothing.",
        old.commit
    );
    Ok(())
}

/// The steps of the upgrade, and the load meanwhile.
struct Steps<'a> {
    begun: Instant,
    customers: &'a Customers,
    databases: &'a Databases,
}

impl Steps<'_> {
    /// Old and new replicas of both services run side by side for most of the time.
    async fn replace_all(
        &self,
        upgrade: &mut Upgrade,
        old: &Old,
        binaries: &Path,
    ) -> anyhow::Result<()> {
        self.done(&format!("everything runs as {}", old.commit))
            .await?;
        upgrade
            .restart_nats(PathBuf::from(NATS_CONFIGURATION))
            .await?;
        self.done("broker restarted with the new configuration")
            .await?;
        upgrade.install(binaries.to_owned());
        upgrade.replace("orders", StopBy::Sigterm).await?;
        self.done("first orders replaced (SIGTERM)").await?;
        upgrade.interrupt_payments().await?;
        self.answered(BACKLOG).await?;
        upgrade.resume_payments().await?;
        self.done(
            "first payments replaced (SIGKILL) while the second one was frozen, with a backlog",
        )
        .await?;
        upgrade
            .replace_second(Service::Orders, StopBy::Sigkill)
            .await?;
        self.done("second orders replaced (SIGKILL)").await?;
        upgrade
            .replace_second(Service::Payments, StopBy::Sigterm)
            .await?;
        self.done("second payments replaced (SIGTERM)").await?;
        upgrade.replace("gateway", StopBy::Sigterm).await?;
        self.done("gateway replaced (SIGTERM)").await
    }

    /// Waits until more orders are final.
    async fn done(&self, what: &str) -> anyhow::Result<()> {
        let wanted = self.final_orders().await? + ORDERS_PER_STEP;
        let deadline = Instant::now() + STEP_WITHIN;
        while self.final_orders().await? < wanted {
            ensure!(
                Instant::now() < deadline,
                "{what}: not {ORDERS_PER_STEP} more final orders within {STEP_WITHIN:?}"
            );
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        println!(
            "{:>6.1} s  {what}; {} orders answered, {} final",
            self.begun.elapsed().as_secs_f32(),
            self.customers.counts().orders,
            self.final_orders().await?
        );
        Ok(())
    }

    /// Waits until more orders are answered.
    async fn answered(&self, orders: u64) -> anyhow::Result<()> {
        let wanted = self.customers.counts().orders + orders;
        let deadline = Instant::now() + STEP_WITHIN;
        while self.customers.counts().orders < wanted {
            ensure!(
                Instant::now() < deadline,
                "not {orders} more orders answered within {STEP_WITHIN:?}"
            );
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        Ok(())
    }

    async fn final_orders(&self) -> anyhow::Result<u64> {
        let sql = "SELECT count(*) FROM orders WHERE status <> 'NEW'";
        let row = self
            .databases
            .orders
            .query_one_raw(Statement::from_string(DbBackend::Postgres, sql))
            .await?;
        let count: i64 = row.context("a count is one row")?.try_get_by_index(0)?;
        Ok(count.unsigned_abs())
    }
}

/// Older versions drop trailing zeros of times. Replayed answers are compared with all times in six
/// digits.
fn with_six_digits(mut history: History) -> History {
    fn rewrite(value: &mut Value) {
        match value {
            Value::String(text) => {
                if let Ok(at) = OffsetDateTime::parse(text, &Rfc3339) {
                    *text = shared_contracts::timestamp::format(at);
                }
            }
            Value::Array(items) => items.iter_mut().for_each(rewrite),
            Value::Object(members) => members.values_mut().for_each(rewrite),
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }
    for exchange in &mut history.exchanges {
        if let Ok(mut answer) = serde_json::from_str(&exchange.answer) {
            rewrite(&mut answer);
            exchange.answer = answer.to_string();
        }
    }
    history
}

fn internal_errors(history: &History) -> usize {
    let statuses = history.exchanges.iter().map(|exchange| exchange.status);
    statuses.filter(|status| *status == Some(500)).count()
}
