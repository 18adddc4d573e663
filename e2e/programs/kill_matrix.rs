//! `./dev kill-matrix`: at every failpoint the process is killed, made to fail, and frozen, while
//! orders are placed. After each run every order must be final and the audit must find nothing.
//! Ends with a table.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use clap::Parser;
use e2e::{checks, until_done};
use futures_util::future::try_join_all;
use sea_orm::{ConnectionTrait as _, DbBackend, Statement};
use serde_json::{Value, json};
use stack::System;
use stack::http::Http;
use stack::testing::{HeldInserts, TestStack};
use tokio::time::Instant;

const ACTIONS: [&str; 3] = ["kill", "error", "pause"];
/// Short timers, so that recovery is quick.
const ACK_WAIT: Duration = Duration::from_millis(1000);
const TIMERS: [(&str, &str); 3] = [
    ("GOZON_ACK_WAIT_MS", "1000"),
    ("GOZON_ASK_AGAIN_MS", "1000"),
    ("GOZON_ASK_AGAIN_MAX_MS", "4000"),
];
const WITHIN: Duration = Duration::from_secs(40);
const REACHED_WITHIN: Duration = Duration::from_secs(10);
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// Kills, fails and freezes every process at every failpoint.
#[derive(Parser)]
struct Arguments {
    /// Only failpoints whose name contains this.
    #[arg(default_value = "")]
    only: String,
    /// Only this action: kill, error or pause.
    #[arg(long)]
    action: Option<String>,
}

struct Run {
    service: &'static str,
    failpoint: &'static str,
    action: &'static str,
    result: anyhow::Result<()>,
    took: Duration,
}

// One thread: the kernel ends the processes of a stack when the thread that started them ends.
#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let mut runs: Vec<(&str, &str, &str)> = Vec::new();
    for (failpoint, services) in failpoint::ALL
        .iter()
        .filter(|(name, _)| name.contains(&arguments.only))
    {
        for service in *services {
            runs.extend(ACTIONS.map(|action| (*service, *failpoint, action)));
        }
    }
    runs.retain(|(_, _, action)| {
        arguments
            .action
            .as_deref()
            .is_none_or(|wanted| wanted == *action)
    });
    ensure!(
        !runs.is_empty(),
        "no failpoint has a name that contains {:?}",
        arguments.only
    );

    let timers = TIMERS
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec();
    let binaries = std::env::current_exe()?
        .parent()
        .context("this program is in a folder")?
        .to_owned();
    let mut matrix = Matrix {
        stack: TestStack::start_in(&binaries, timers).await?,
        customer: 0,
        orders: 0,
    };
    let total = runs.len();
    let mut results = Vec::with_capacity(total);
    for (number, (service, failpoint, action)) in runs.into_iter().enumerate() {
        let begun = Instant::now();
        let result = matrix.run(service, failpoint, action).await;
        let run = Run {
            service,
            failpoint,
            action,
            result,
            took: begun.elapsed(),
        };
        let verdict = run
            .result
            .as_ref()
            .map_or_else(|error| format!("FAILED: {error:#}"), |()| "ok".to_owned());
        println!(
            "{:>3}/{total} {:<9} {:<28} {:<6} {:>5.1} s  {verdict}",
            number + 1,
            run.service,
            run.failpoint,
            run.action,
            run.took.as_secs_f32()
        );
        if run.result.is_err() {
            matrix
                .recover()
                .await
                .context("the system does not recover, so no other run would prove anything")?;
        }
        results.push(run);
    }
    println!("\n{}", table(&results));
    let failed = results.iter().filter(|run| run.result.is_err()).count();
    let took: Duration = results.iter().map(|run| run.took).sum();
    println!(
        "{} runs, {} orders, {failed} failed, {:.0} s. After each run: every order final, no dead letter, no finding of the audit.",
        results.len(),
        matrix.orders,
        took.as_secs_f32()
    );
    Ok(if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn table(results: &[Run]) -> String {
    let mut lines = vec![format!(
        "{:<9} {:<28} {:>7} {:>7} {:>7}",
        "service", "failpoint", ACTIONS[0], ACTIONS[1], ACTIONS[2]
    )];
    for run in results {
        let line = format!("{:<9} {:<28}", run.service, run.failpoint);
        let cell = format!(" {:>7}", if run.result.is_ok() { "ok" } else { "FAILED" });
        match lines.last_mut() {
            Some(last) if last.starts_with(&line) => last.push_str(&cell),
            _ => lines.push(line + &cell),
        }
    }
    lines.join("\n")
}

async fn has_deferred(system: &System, service: &str) -> anyhow::Result<bool> {
    let db = system.postgres().connect(service).await?;
    let query = Statement::from_string(DbBackend::Postgres, "SELECT 1 FROM deferred LIMIT 1");
    let found = db.query_one_raw(query).await?.is_some();
    db.close().await?;
    Ok(found)
}

struct Matrix {
    stack: TestStack,
    customer: u32,
    orders: usize,
}

impl Matrix {
    async fn run(
        &mut self,
        service: &'static str,
        failpoint: &'static str,
        action: &'static str,
    ) -> anyhow::Result<()> {
        // The relay polls its table only for rows that were left behind.
        if matches!(failpoint, "relay.before_commit" | "relay.after_commit") {
            self.leave_a_row(service).await?;
        }
        // Messages are deferred while their row is locked.
        let held = if failpoint.starts_with("defer.") || failpoint.starts_with("catch_up.") {
            // The run before may have left a message whose repetition was applied already.
            let deadline = Instant::now() + WITHIN;
            while has_deferred(&self.stack.system, service).await? {
                ensure!(Instant::now() < deadline, "a message stays deferred");
                tokio::time::sleep(LOOK_INTERVAL).await;
            }
            let db = self.stack.system.postgres().connect(service).await?;
            Some(HeldInserts::refused(db.clone(), "inbox", "55P03").await?)
        } else {
            None
        };
        let system = &mut self.stack.system;
        let log = system.folder().log(service);
        let log_begins = std::fs::metadata(&log).map_or(0, |metadata| metadata.len());
        system.stop(service).await?;
        system.spawn_with(
            service,
            &[(failpoint::VARIABLE, &format!("{failpoint}={action}"))],
        )?;
        // The reconciler has work only while payments does not answer.
        let nobody_answers = failpoint.starts_with("reconcile.");
        if nobody_answers {
            system.stop("payments").await?;
        }

        self.customer += 1;
        let http = Http::new(system.address("gateway"));
        let reached = || {
            let log = std::fs::read(&log).unwrap_or_default();
            let new = log
                .get(usize::try_from(log_begins).unwrap_or(0)..)
                .unwrap_or_default();
            String::from_utf8_lossy(new).contains(&format!("failpoint=\"{failpoint}\""))
        };
        let customer = format!("customer-{}", self.customer);
        let mut shopping = std::pin::pin!(shopping(&http, &customer, nobody_answers));
        let deadline = Instant::now() + WITHIN;
        let mut frozen_since: Option<Instant> = None;
        loop {
            tokio::select! {
                done = &mut shopping => break done?,
                () = tokio::time::sleep(LOOK_INTERVAL) => {}
            }
            ensure!(
                Instant::now() < deadline,
                "not settled within {WITHIN:?}; failpoint reached: {}",
                reached()
            );
            // A process that died is restarted. One that froze is resumed when others have taken
            // over its messages.
            if system.ended(service).is_some() {
                system.spawn(service)?;
            } else if system.is_paused(service) {
                let since = *frozen_since.get_or_insert_with(Instant::now);
                if since.elapsed() > ACK_WAIT * 3 / 2 {
                    system.resume(service)?;
                    frozen_since = None;
                }
            }
            if let Some(held) = &held
                && (reached() || has_deferred(system, service).await?)
            {
                held.release().await?;
            }
            if nobody_answers && reached() && system.pid("payments").is_none() {
                system.spawn("payments")?;
            }
        }
        self.orders += if nobody_answers { 1 } else { 5 };
        // A relay may poll its table only after the orders are final.
        let deadline = Instant::now() + REACHED_WITHIN;
        while !reached() && Instant::now() < deadline {
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
        ensure!(
            reached(),
            "the failpoint was not reached: the run proves nothing"
        );
        // The step after the last failpoint may still be in progress.
        if self.stack.system.is_paused(service) {
            self.stack.system.resume(service)?;
        }
        if self.stack.system.ended(service).is_some() {
            self.stack.system.spawn(service)?;
        }
        let ready = self.stack.system.until_ready(service).await;
        // The process may have died only now.
        if self.stack.system.ended(service).is_some() {
            self.stack.system.start(service).await?;
        } else {
            ready?;
        }
        self.audit().await
    }

    /// Restarts the services without failpoints after a failed run, so that the next run does not
    /// fail for the same reason.
    async fn recover(&mut self) -> anyhow::Result<()> {
        let system = &mut self.stack.system;
        for service in ["orders", "payments", "gateway"] {
            system.kill(service).await?;
            system.start(service).await?;
        }
        let databases = checks::databases(system).await?;
        checks::until_settled(&databases, Instant::now() + WITHIN).await?;
        let orders = databases
            .orders
            .query_one_raw(Statement::from_string(
                DbBackend::Postgres,
                "SELECT count(*) FROM orders",
            ))
            .await?
            .context("a count is one row")?
            .try_get_by_index::<i64>(0)?;
        self.orders = usize::try_from(orders)?;
        databases.orders.close().await?;
        databases.payments.close().await?;
        Ok(())
    }

    /// Leaves an unpublished outbox row behind, as a crash right after the commit would.
    async fn leave_a_row(&mut self, service: &'static str) -> anyhow::Result<()> {
        self.customer += 1;
        self.orders += 1;
        let http = Http::new(self.stack.system.address("gateway"));
        shopping(&http, &format!("customer-{}", self.customer), true).await?;
        self.stack.system.stop(service).await?;
        let db = self.stack.system.postgres().connect(service).await?;
        let left = db
            .execute_unprepared(
                "UPDATE outbox SET published_at = NULL, stream_sequence = NULL, attempts = 0, created_at = created_at - interval '1 minute'
                 WHERE event_id = (SELECT event_id FROM outbox ORDER BY event_id DESC LIMIT 1)",
            )
            .await?;
        db.close().await?;
        ensure!(
            left.rows_affected() > 0,
            "the outbox is empty, so no row can be left behind"
        );
        Ok(())
    }

    async fn audit(&self) -> anyhow::Result<()> {
        let databases = checks::databases(&self.stack.system).await?;
        let grace = Duration::from_secs(5);
        let report = checks::audit_settled(&self.stack.system, &databases, grace, None).await?;
        databases.orders.close().await?;
        databases.payments.close().await?;
        let findings: Vec<String> = report
            .findings
            .iter()
            .map(|finding| format!("{} {} {}", finding.kind, finding.id, finding.detail))
            .collect();
        ensure!(findings.is_empty(), "{}", findings.join("; "));
        ensure!(
            report.not_looked_at.is_empty(),
            "not checked: {}",
            report.not_looked_at.join("; ")
        );
        ensure!(
            report.orders == self.orders as u64,
            "{} orders are stored, {} were placed",
            report.orders,
            self.orders
        );
        Ok(())
    }
}

/// A customer with money for three of five orders, who retries until everything is answered.
/// With `one`, only one order and no account.
async fn shopping(http: &Http, customer: &str, one: bool) -> anyhow::Result<()> {
    let order = async |amount: i64| {
        let placed = until_done(
            http,
            "/v1/orders",
            &json!({ "user_id": customer, "amount": amount }),
            WITHIN,
        )
        .await?;
        let path = format!(
            "/v1/orders/{}",
            placed.json()["id"].as_str().context("an order has an id")?
        );
        until_final(http, &path).await
    };
    if one {
        let ended = order(30).await?;
        ensure!(
            ended["reason"] == "no_account",
            "unexpected final state: {ended}"
        );
        return Ok(());
    }
    until_done(
        http,
        "/v1/accounts",
        &json!({ "user_id": customer }),
        WITHIN,
    )
    .await?;
    until_done(
        http,
        &format!("/v1/accounts/{customer}/deposits"),
        &json!({ "amount": 100 }),
        WITHIN,
    )
    .await?;
    let ended = try_join_all((0..5).map(|_| order(30))).await?;
    let finished = ended
        .iter()
        .filter(|order| order["status"] == "FINISHED")
        .count();
    ensure!(
        finished == 3,
        "{finished} of 5 orders are paid, with money for 3"
    );
    let balance =
        until_answered(http, &format!("/v1/accounts/{customer}")).await?["balance"].clone();
    ensure!(balance == 10, "the balance is {balance}, not 10");
    Ok(())
}

async fn until_final(http: &Http, path: &str) -> anyhow::Result<Value> {
    loop {
        let order = until_answered(http, path).await?;
        if order["status"] != "NEW" {
            return Ok(order);
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

async fn until_answered(http: &Http, path: &str) -> anyhow::Result<Value> {
    let deadline = Instant::now() + WITHIN;
    loop {
        match http.get(path).await {
            Ok(answer) if answer.status == 200 => return Ok(answer.json()),
            answer if Instant::now() > deadline => anyhow::bail!("{path}: {answer:?}"),
            _ => tokio::time::sleep(LOOK_INTERVAL).await,
        }
    }
}
