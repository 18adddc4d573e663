//! `./dev overload`: sends five times the orders that the system can process. It must answer
//! quickly, accept what it can, make all accepted orders final, and regain its full capacity.
//! Prints figures; exit code 1 if it did not.
//!
//! A load generator on the same machine cannot send five times its capacity: both share
//! the processors. So the connection between orders and its database is slowed down, and the
//! database becomes the bottleneck.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use clap::Parser;
use e2e::{checks, until_done};
use futures_util::future::join_all;
use futures_util::stream::{FuturesUnordered, StreamExt as _};
use serde_json::{Value, json};
use stack::http::Http;
use stack::proxy::{Protocol, Proxy};
use stack::seed::Seed;
use stack::testing::TestStack;
use tokio::runtime::Builder;
use tokio::time::Instant;
use uuid::Uuid;

const CUSTOMERS: usize = 200;
/// Enough customers to fill the batches of orders, but below every limit: this measures the
/// capacity.
const WORKERS: usize = 400;
const MEASURE: Duration = Duration::from_secs(5);
/// Requests in flight: twice the gateway's limit, and no more connections than it accepts.
const OPEN_MAX: usize = 1000;
const COME_AGAIN: Duration = Duration::from_millis(100);
const TICK: Duration = Duration::from_millis(5);
const SETTLED_WITHIN: Duration = Duration::from_secs(120);
/// Clients give up after this time, so nearly all requests must be answered within it.
const ANSWER_P99_MAX: Duration = Duration::from_secs(3);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);
/// The generator must send at least this share of its requests, or the run proves nothing.
const SENT_SHARE_MIN: f64 = 0.9;
/// The generator uses part of the machine, so slightly fewer orders may be accepted than without
/// it.
const TAKEN_SHARE_MIN: f64 = 0.6;
const RECOVERED_SHARE_MIN: f64 = 0.7;

/// Sends more orders than the system can process.
#[derive(Parser)]
struct Arguments {
    /// Load as a multiple of the capacity.
    #[arg(long, default_value_t = 5.0)]
    times: f64,
    /// Duration in seconds.
    #[arg(long, default_value_t = 20)]
    seconds: u64,
    /// The maximum delay of a write between orders and its database; half of it on average.
    #[arg(long, default_value_t = 90)]
    slow_ms: u64,
    /// The folder with the programs; by default that of this one.
    #[arg(long)]
    binaries: Option<PathBuf>,
}

// One thread: the kernel ends the processes of a stack when the thread that started them ends.
#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let own = std::env::current_exe()?
        .parent()
        .context("this program is in a folder")?
        .to_owned();
    let mut stack =
        TestStack::prepare_in(arguments.binaries.as_ref().unwrap_or(&own), Vec::new()).await?;
    // On its own thread, so that the load does not slow the proxy down.
    let network = Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    let port = stack.system.port("postgres")?;
    let proxy = network
        .spawn(Proxy::open(Protocol::Postgres, port, Seed::new(1)))
        .await??;
    stack.system.redirect("orders", "postgres", proxy.port());
    stack.system.start_all(|_, _| {}).await?;
    let shop = Shop {
        http: Http::new(stack.system.address("gateway")),
        taken: Cell::new(0),
    };
    shop.open().await?;

    let slow = Duration::from_millis(arguments.slow_ms);
    proxy.slow(slow, 0);
    // The first orders are a warm-up.
    shop.capacity(MEASURE / 2).await?;
    let before = shop.capacity(MEASURE).await?;
    println!(
        "capacity before      {before:8.0} orders/s, {WORKERS} concurrent customers, slow connection to the database"
    );

    let rate = before * arguments.times;
    let seconds = Duration::from_secs(arguments.seconds);
    let result = shop.open_loop(rate, seconds).await;
    let taken = result.taken.len() as f64 / arguments.seconds as f64;
    let sent = result.sent as f64 / arguments.seconds as f64;
    println!(
        "planned              {rate:8.0} orders/s for {seconds:?}; {sent:.0} orders/s sent, at most {OPEN_MAX} in flight"
    );
    println!(
        "accepted             {taken:8.0} orders/s, latency {}",
        Quantiles::of(&result.taken)
    );
    println!(
        "rejected             {:8.0} orders/s, latency {}",
        result.refused.len() as f64 / arguments.seconds as f64,
        Quantiles::of(&result.refused)
    );
    println!("other answers        {:?}", result.others);

    // Settling the accepted orders is not measured, so the bottleneck is removed.
    proxy.clear_faults();
    let begun = Instant::now();
    let databases = checks::databases(&stack.system).await?;
    let settled = loop {
        let grace = Duration::from_secs(2);
        let report = checks::audit_settled(&stack.system, &databases, grace, None).await?;
        if report.findings.is_empty() || begun.elapsed() > SETTLED_WITHIN {
            break report;
        }
    };
    println!(
        "all final after      {:8.1} s, {} orders",
        begun.elapsed().as_secs_f64(),
        settled.orders
    );
    for finding in settled.findings.iter().take(10) {
        println!("  {} {} {}", finding.kind, finding.id, finding.detail);
    }
    let taken_in_all = shop.taken.get();
    proxy.slow(slow, 0);
    let after = shop.capacity(MEASURE).await?;
    println!("capacity after       {after:8.0} orders/s");

    let mut good = true;
    let all: Vec<Duration> = result
        .taken
        .iter()
        .chain(&result.refused)
        .copied()
        .collect();
    for (holds, what) in [
        (
            sent >= rate * SENT_SHARE_MIN,
            "the generator sent what was planned; otherwise the run proves nothing",
        ),
        (!result.refused.is_empty(), "some orders were rejected"),
        (
            result.others.is_empty(),
            "every answer is 201, or 503 or 429 with a problem document and Retry-After",
        ),
        (
            Quantiles::of(&all).p99 <= ANSWER_P99_MAX,
            "p99 of the latency is at most 3 s",
        ),
        (
            taken >= before * TAKEN_SHARE_MIN,
            "the rate of accepted orders does not collapse",
        ),
        (
            settled.findings.is_empty(),
            "every accepted order is final, and the audit finds nothing",
        ),
        (
            settled.orders == taken_in_all,
            "exactly the orders answered with 201 are stored",
        ),
        (
            after >= before * RECOVERED_SHARE_MIN,
            "the capacity is as before",
        ),
    ] {
        println!("{} {what}", if holds { "ok    " } else { "FAILED" });
        good &= holds;
    }
    network.shutdown_background();
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

struct Shop {
    http: Http,
    /// Orders answered with 201.
    taken: Cell<u64>,
}

#[derive(Default)]
struct OpenLoopResult {
    sent: usize,
    taken: Vec<Duration>,
    refused: Vec<Duration>,
    others: BTreeMap<String, usize>,
}

impl Shop {
    async fn open(&self) -> anyhow::Result<()> {
        for customer in 0..CUSTOMERS {
            until_done(
                &self.http,
                "/v1/accounts",
                &json!({ "user_id": user(customer) }),
                SETTLED_WITHIN,
            )
            .await?;
            let path = format!("/v1/accounts/{}/deposits", user(customer));
            until_done(
                &self.http,
                &path,
                &json!({ "amount": 1_000_000_000 }),
                SETTLED_WITHIN,
            )
            .await?;
        }
        Ok(())
    }

    /// Orders per second in a closed loop: each customer waits for the answer before the next
    /// order.
    async fn capacity(&self, time: Duration) -> anyhow::Result<f64> {
        let begun = Instant::now();
        let taken = Cell::new(0_u64);
        let workers = (0..WORKERS).map(async |worker| {
            let mut number = worker;
            while begun.elapsed() < time {
                let (answer, _) = self.order(number).await;
                number += WORKERS;
                match answer {
                    Ok((201, _)) => taken.set(taken.get() + 1),
                    // A batch was slow, or there were too many connections: only full batches
                    // matter.
                    Ok((503, problem)) if problem["outcome"].is_null() => {
                        tokio::time::sleep(COME_AGAIN).await
                    }
                    other => anyhow::bail!(
                        "an order was not accepted although there is no overload: {other:?}"
                    ),
                }
            }
            Ok(())
        });
        join_all(workers)
            .await
            .into_iter()
            .collect::<anyhow::Result<()>>()?;
        let rate = taken.get() as f64 / begun.elapsed().as_secs_f64();
        ensure!(rate > 0.0, "no order was accepted");
        Ok(rate)
    }

    /// Orders in an open loop at a fixed rate, up to a number in flight.
    async fn open_loop(&self, rate: f64, time: Duration) -> OpenLoopResult {
        let result = RefCell::new(OpenLoopResult::default());
        let begun = Instant::now();
        let mut open = FuturesUnordered::new();
        let mut ticks = tokio::time::interval(TICK);
        let note = |(answer, took): (anyhow::Result<(u16, Value)>, Duration)| {
            let mut result = result.borrow_mut();
            match answer {
                Ok((201, _)) => result.taken.push(took),
                Ok((503 | 429, problem))
                    if problem["code"].is_string() && problem["outcome"].is_null() =>
                {
                    result.refused.push(took)
                }
                Ok((status, problem)) => {
                    let what = format!("{status} {} {}", problem["code"], problem["outcome"]);
                    *result.others.entry(what).or_default() += 1;
                }
                Err(error) => *result.others.entry(format!("{error:#}")).or_default() += 1,
            }
        };
        while begun.elapsed() < time {
            tokio::select! {
                _ = ticks.tick() => {
                    let due = (begun.elapsed().as_secs_f64() * rate) as usize;
                    let sent = result.borrow().sent;
                    let now = due.saturating_sub(sent).min(OPEN_MAX - open.len());
                    open.extend((sent..sent + now).map(|number| self.order(number)));
                    result.borrow_mut().sent += now;
                }
                Some(answered) = open.next() => note(answered),
            }
        }
        while let Some(answered) = open.next().await {
            note(answered);
        }
        result.into_inner()
    }

    /// One order under a new key: status, problem if any, and latency.
    async fn order(&self, number: usize) -> (anyhow::Result<(u16, Value)>, Duration) {
        let begun = Instant::now();
        let (key, body) = (
            Uuid::new_v4().to_string(),
            json!({ "user_id": user(number % CUSTOMERS), "amount": 1 }),
        );
        let answered = tokio::time::timeout(
            ANSWER_TIMEOUT,
            self.http.post("/v1/orders", Some(&key), &body),
        )
        .await;
        let took = begun.elapsed();
        let answer = match answered {
            Err(_) => Err(anyhow::anyhow!("no answer within {ANSWER_TIMEOUT:?}")),
            Ok(Err(error)) => Err(error),
            Ok(Ok(answer)) if answer.status == 201 => {
                self.taken.set(self.taken.get() + 1);
                Ok((201, Value::Null))
            }
            Ok(Ok(answer)) if answer.header("retry-after").is_none() => Ok((
                answer.status,
                json!({ "code": null, "outcome": "no Retry-After" }),
            )),
            Ok(Ok(answer)) => Ok((answer.status, answer.json())),
        };
        (answer, took)
    }
}

fn user(number: usize) -> String {
    format!("customer-{number}")
}

struct Quantiles {
    p50: Duration,
    p99: Duration,
    max: Duration,
}

impl Quantiles {
    fn of(times: &[Duration]) -> Self {
        let mut sorted = times.to_vec();
        sorted.sort_unstable();
        let at = |share: f64| {
            sorted
                .get(((sorted.len() as f64 * share) as usize).min(sorted.len().saturating_sub(1)))
                .copied()
        };
        Self {
            p50: at(0.5).unwrap_or_default(),
            p99: at(0.99).unwrap_or_default(),
            max: at(1.0).unwrap_or_default(),
        }
    }
}

impl std::fmt::Display for Quantiles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ms = |time: Duration| time.as_secs_f64() * 1000.0;
        write!(
            f,
            "p50 {:.0} ms, p99 {:.0} ms, max {:.0} ms",
            ms(self.p50),
            ms(self.p99),
            ms(self.max)
        )
    }
}
