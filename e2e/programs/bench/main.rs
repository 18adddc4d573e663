//! `./dev bench`: measures the whole system and, in the same run, what database and broker can do
//! alone.
//!
//! Everything that is compared is measured in turns, so that noise affects all alike; the medians
//! of the runs count. A run fails if an order is rejected or the audit finds anything.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use clap::{Parser, ValueEnum};
use e2e::broker::operator;
use e2e::checks;
use ops::audit::{self, CompareWith, Databases, Options};
use sea_orm::{ConnectionTrait as _, DatabaseConnection, DbBackend, FromQueryResult, Statement};
use stack::http::Http;
use stack::ports::Ports;
use stack::process::Process;
use stack::testing::{TestStack, eventually};
use stack::{Service, System};

mod floor;
mod legs;
mod load;
mod report;
mod statements;
mod usage;

use load::Saturation;

/// Orders in the backlog that payments processes.
const BACKLOG: usize = 20_000;
const ORDERS_PER_SECOND: u32 = 100;
/// Long, because the kernel counts processor time in hundredths of a second.
const REST: Duration = Duration::from_secs(40);
/// The allocator does not return all memory. A leak would grow by more than this.
const SOAK_GROWTH_MAX_MIB: f64 = 8.0;
const SOON: Duration = Duration::from_secs(60);

/// Measures throughput, latency, CPU and memory of the whole system.
#[derive(Parser)]
struct Arguments {
    /// Number of runs; the medians count.
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Duration of one measurement.
    #[arg(long, default_value_t = 8)]
    seconds: u64,
    /// Also compare with tables that are filled with this many old orders.
    #[arg(long, default_value_t = 0)]
    prefilled: u64,
    /// Measure only these parts.
    #[arg(long, value_enum, value_delimiter = ',', conflicts_with = "report")]
    only: Vec<Part>,
    /// Also show PostgreSQL's time per statement. This slows PostgreSQL down slightly.
    #[arg(long)]
    statements: bool,
    /// Change a setting of PostgreSQL, to measure its effect: `name=value`.
    #[arg(long = "set", conflicts_with = "report")]
    settings: Vec<String>,
    /// Folder for the report. `latest.json` is always written to target/bench.
    #[arg(long)]
    report: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// PostgreSQL and NATS alone
    Floor,
    /// payments processes a full stream
    Backlog,
    /// As many orders as possible through HTTP
    Saturation,
    /// Saturation with a single account
    Hot,
    /// Saturation with two replicas of each service
    Replicas,
    /// 100 orders per second
    Latency,
    /// No load
    Rest,
    /// 100 orders per second, long enough to show a memory leak; only if named
    Soak,
}

/// Figures by name, each with its unit in the name.
type Figures = BTreeMap<String, f64>;

struct Bench {
    stack: TestStack,
    http: Http,
    databases: Databases,
    time: Duration,
    only: Vec<Part>,
}

/// Data for the plots, from the last run.
#[derive(Default)]
struct PlotData {
    latencies: Vec<f64>,
    saturation: Saturation,
}

// One thread: the kernel ends the processes of a stack when the thread that started them ends.
#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let program = std::env::current_exe()?;
    let binaries = program.parent().context("this program is in a folder")?;
    ensure!(
        !cfg!(debug_assertions),
        "a debug build measures nothing: run `./dev bench`"
    );
    let mut stack = TestStack::start_in(binaries, Vec::new()).await?;
    statements::configure(&mut stack.system, &arguments.settings, arguments.statements).await?;
    let http = Http::new(stack.system.address("gateway"));
    let databases = checks::databases(&stack.system).await?;
    let mut bench = Bench {
        stack,
        http,
        databases,
        time: Duration::from_secs(arguments.seconds),
        only: arguments.only,
    };
    bench.assert_durable().await?;
    progress("durable: fsync, synchronous_commit and sync_interval are on");
    // First, because the database vacuums after load.
    let mut at_rest = Figures::new();
    if bench.measures(Part::Rest) {
        bench.rest(&mut at_rest).await?;
    }
    bench.open_accounts().await?;
    floor::prepare(&bench.stack.system).await?;
    load::saturate(
        std::slice::from_ref(&bench.http),
        &bench.databases.orders,
        load::USERS,
        Duration::from_secs(3),
    )
    .await?;
    progress("warm");
    let mut empty = Vec::new();
    if arguments.prefilled > 0 {
        for number in 1..=arguments.runs {
            progress(format!("empty tables, run {number} of {}", arguments.runs));
            let mut figures = Figures::new();
            bench.backlog(&mut figures).await?;
            bench.saturation(&mut figures).await?;
            empty.push(figures);
        }
        progress(format!(
            "filling the tables with {} orders ...",
            arguments.prefilled
        ));
        bench.prefill(arguments.prefilled).await?;
    }
    if arguments.statements {
        statements::reset(&bench.databases).await?;
    }

    let mut runs = Vec::new();
    let mut plot_data = PlotData::default();
    for number in 1..=arguments.runs {
        progress(format!("run {number} of {}", arguments.runs));
        let mut figures = Figures::new();
        plot_data = bench.run(&mut figures).await?;
        runs.push(figures);
    }
    let mut figures = report::medians(&runs);
    figures.append(&mut at_rest);
    for part in usage::PARTS {
        figures.insert(
            format!("memory_{part}_peak_mib"),
            usage::peak_memory_mib(&mut bench.stack.system, part)?,
        );
    }
    if arguments.prefilled > 0 {
        figures.insert("prefilled_orders".to_owned(), arguments.prefilled as f64);
        let empty = report::medians(&empty);
        for (ratio, name) in [
            ("prefilled_e2e_ratio", "e2e_finished_per_s"),
            ("prefilled_drain_ratio", "drain_decisions_per_s"),
        ] {
            if let (Some(full), Some(empty)) = (figures.get(name), empty.get(name)) {
                figures.insert(ratio.to_owned(), full / empty);
            }
        }
    }
    if arguments.statements {
        statements::show(&bench.databases).await?;
    }
    let broker = operator(&bench.stack.system).await?;
    let compare_with = CompareWith {
        streams: Some(broker.jetstream()),
        history: None,
    };
    let found = audit::audit_with(&bench.databases, Options::default(), compare_with).await?;
    ensure!(
        found.findings.is_empty(),
        "the audit has findings: {:?}",
        found.findings
    );
    ensure!(
        found.not_looked_at.is_empty(),
        "not checked: {}",
        found.not_looked_at.join("; ")
    );
    progress(format!(
        "audit: {} orders; databases and streams are consistent",
        found.orders
    ));
    report::write(&figures, &plot_data, binaries, arguments.report.as_deref())
}

fn progress(text: impl std::fmt::Display) {
    eprintln!("{text}");
}

impl Bench {
    /// Stops the run if durability is off: the figures would be worthless.
    async fn assert_durable(&self) -> anyhow::Result<()> {
        for db in [&self.databases.orders, &self.databases.payments] {
            for setting in ["fsync", "synchronous_commit", "full_page_writes"] {
                let row = db
                    .query_one_raw(Statement::from_string(
                        DbBackend::Postgres,
                        format!("SHOW {setting}"),
                    ))
                    .await?;
                let value: String = row.context("SHOW shows")?.try_get_by_index(0)?;
                ensure!(value == "on", "{setting} is {value}");
            }
        }
        let monitor = Http::new(format!(
            "http://127.0.0.1:{}",
            self.stack.system.ports().nats_monitor
        ));
        let config = monitor.get("/jsz?config=true").await?.json();
        ensure!(
            config["config"]["sync_always"] == true,
            "sync_interval of NATS is not `always`: {}",
            config["config"]
        );
        Ok(())
    }

    async fn open_accounts(&self) -> anyhow::Result<()> {
        let statement = format!(
            "INSERT INTO accounts (user_id, balance, entry_no, idempotency_key, created_at)
             SELECT 'user-' || n, 1000000000, 1, 'bench', now() FROM generate_series(0, {}) n;
             INSERT INTO transfers (id, kind, user_id, entry_no, debit_account, credit_account, amount, balance_after, idempotency_key, request_hash)
             SELECT gen_random_uuid(), 'deposit', user_id, 1, 'world', 'user:' || user_id, 1000000000, 1000000000, 'bench', '' FROM accounts",
            load::USERS - 1
        );
        self.databases
            .payments
            .execute_unprepared(&statement)
            .await?;
        Ok(())
    }

    /// Inserts old, declined orders of one customer, with all rows that are kept for ever.
    async fn prefill(&self, orders: u64) -> anyhow::Result<()> {
        let id = "('01000000-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid";
        let old = "now() - interval '30 days'";
        let series = format!("generate_series(1, {orders}) n");
        self.databases
            .orders
            .execute_unprepared(&format!(
                "INSERT INTO orders (id, user_id, amount, description, status, reason, idempotency_key, request_hash, placed_event_id, final_event_id, created_at, updated_at)
                 SELECT {id}, 'old-' || n % 100000, 1, 'A lamp', 'CANCELLED', 'no_account', n::text, sha256(n::text::bytea), {id}, {id}, {old}, {old} FROM {series}"
            ))
            .await?;
        self.databases
            .payments
            .execute_unprepared(&format!(
                "INSERT INTO payments (order_id, user_id, amount, request_hash, outcome, reason, request_event_id, event_id, decided_at)
                 SELECT {id}, 'old-' || n % 100000, 1, sha256(n::text::bytea), 'declined', 'no_account', {id}, {id}, {old} FROM {series}"
            ))
            .await?;
        // Vacuum now; otherwise the measurement would include it.
        for (db, table) in [
            (&self.databases.orders, "orders"),
            (&self.databases.payments, "payments"),
        ] {
            db.execute_unprepared(&format!("VACUUM (ANALYZE) {table}"))
                .await?;
            db.execute_unprepared("CHECKPOINT").await?;
        }
        Ok(())
    }

    async fn run(&mut self, figures: &mut Figures) -> anyhow::Result<PlotData> {
        let mut plot_data = PlotData::default();
        if self.measures(Part::Floor) {
            self.floors(figures).await?;
        }
        if self.measures(Part::Backlog) {
            self.backlog(figures).await?;
        }
        // The baseline for the next two measurements.
        if self.measures(Part::Saturation)
            || self.measures(Part::Hot)
            || self.measures(Part::Replicas)
        {
            plot_data.saturation = self.saturation(figures).await?;
        }
        if self.measures(Part::Hot) {
            let hot = load::saturate(
                std::slice::from_ref(&self.http),
                &self.databases.orders,
                1,
                self.time,
            )
            .await?;
            let ratio = hot.finished_per_s / plot_data.saturation.finished_per_s;
            progress(format!(
                "  one account: {:.0} orders/s, {ratio:.2} of {} accounts",
                hot.finished_per_s,
                load::USERS
            ));
            figures.insert("hot_account_finished_per_s".to_owned(), hot.finished_per_s);
            figures.insert("hot_account_ratio".to_owned(), ratio);
        }
        if self.measures(Part::Replicas) {
            let twice = self.with_replicas().await?;
            let ratio = twice.finished_per_s / plot_data.saturation.finished_per_s;
            progress(format!(
                "  two replicas of each service: {:.0} orders/s, {ratio:.2} of one",
                twice.finished_per_s
            ));
            figures.insert("replicas_finished_per_s".to_owned(), twice.finished_per_s);
            figures.insert("replicas_ratio".to_owned(), ratio);
        }
        if self.measures(Part::Latency) {
            let waited = load::open_loop(&self.http, ORDERS_PER_SECOND, self.time).await?;
            plot_data.latencies = waited.iter().map(load::TimedOrder::milliseconds).collect();
            plot_data.latencies.sort_by(f64::total_cmp);
            let [p50, p99] =
                [0.5, 0.99].map(|share| report::percentile(&plot_data.latencies, share));
            progress(format!(
                "  at {ORDERS_PER_SECOND} orders/s: {p50:.1} ms p50, {p99:.1} ms p99 from POST to FINISHED"
            ));
            figures.insert("latency_100_p50_ms".to_owned(), p50);
            figures.insert("latency_100_p99_ms".to_owned(), p99);
            for (leg, median) in legs::LEGS
                .into_iter()
                .zip(legs::medians(&self.databases, &waited).await?)
            {
                progress(format!("    {leg}: {median:.2} ms"));
                figures.insert(format!("latency_100_{leg}_ms"), median);
            }
        }
        if self.only.contains(&Part::Soak) {
            self.soak(figures).await?;
        }
        Ok(plot_data)
    }

    /// CPU without load.
    async fn rest(&mut self, figures: &mut Figures) -> anyhow::Result<()> {
        let before = self.cpu()?;
        tokio::time::sleep(REST).await;
        let mut all = 0.0;
        for (part, (before, after)) in usage::PARTS
            .into_iter()
            .zip(before.into_iter().zip(self.cpu()?))
        {
            let percent = (after - before) * 100.0 / REST.as_secs_f64();
            progress(format!("  at rest: {part} takes {percent:.2} % of a core"));
            figures.insert(format!("rest_cpu_{part}_percent_of_a_core"), percent);
            all += percent;
        }
        figures.insert("rest_cpu_percent_of_a_core".to_owned(), all);
        Ok(())
    }

    /// Compares memory at the end with memory after the first quarter of the time.
    async fn soak(&mut self, figures: &mut Figures) -> anyhow::Result<()> {
        load::open_loop(&self.http, ORDERS_PER_SECOND, self.time / 4).await?;
        let before = self.memory()?;
        load::open_loop(&self.http, ORDERS_PER_SECOND, self.time * 3 / 4).await?;
        for (part, (before, after)) in usage::PARTS
            .into_iter()
            .zip(before.into_iter().zip(self.memory()?))
        {
            progress(format!(
                "  soak: {part} had {before:.1} MiB and has {after:.1} MiB"
            ));
            figures.insert(format!("soak_{part}_growth_mib"), after - before);
            let ours = ["orders", "payments", "gateway"].contains(&part);
            ensure!(
                !ours || after - before <= SOAK_GROWTH_MAX_MIB,
                "{part} grows: {before:.1} MiB, then {after:.1} MiB"
            );
        }
        Ok(())
    }

    fn memory(&mut self) -> anyhow::Result<Vec<f64>> {
        usage::PARTS
            .into_iter()
            .map(|part| usage::memory_mib(&mut self.stack.system, part))
            .collect()
    }

    fn measures(&self, part: Part) -> bool {
        self.only.is_empty() || self.only.contains(&part)
    }

    async fn floors(&self, figures: &mut Figures) -> anyhow::Result<()> {
        let time = self.time / 2;
        for clients in [1, 8, 32] {
            let rate = floor::debits(&self.stack.system, clients, time).await?;
            progress(format!(
                "  floor: {rate:.0} debits/s, one per transaction, {clients} clients"
            ));
            figures.insert(format!("floor_c{clients}_debits_per_s"), rate);
        }
        let rate = floor::publishes(&self.stack.system, time).await?;
        progress(format!(
            "  floor: {rate:.0} messages/s acknowledged individually by the broker"
        ));
        figures.insert("floor_publishes_per_s".to_owned(), rate);
        Ok(())
    }

    async fn saturation(&mut self, figures: &mut Figures) -> anyhow::Result<Saturation> {
        let before = self.cpu()?;
        let saturation = load::saturate(
            std::slice::from_ref(&self.http),
            &self.databases.orders,
            load::USERS,
            self.time,
        )
        .await?;
        let Saturation {
            accepted_per_s,
            finished_per_s,
            orders,
            p50_ms,
            p99_ms,
            ..
        } = saturation;
        progress(format!(
            "  end to end: {accepted_per_s:.0} orders/s accepted, {finished_per_s:.0}/s FINISHED, {p50_ms:.1} ms p50, {p99_ms:.1} ms p99"
        ));
        figures.insert("e2e_accepted_per_s".to_owned(), accepted_per_s);
        figures.insert("e2e_finished_per_s".to_owned(), finished_per_s);
        figures.insert("e2e_p50_ms".to_owned(), p50_ms);
        figures.insert("e2e_p99_ms".to_owned(), p99_ms);
        let mut total = 0.0;
        for (part, (before, after)) in usage::PARTS
            .into_iter()
            .zip(before.into_iter().zip(self.cpu()?))
        {
            let per_thousand = (after - before) * 1000.0 / orders as f64;
            figures.insert(format!("cpu_{part}_s_per_1000_orders"), per_thousand);
            total += per_thousand;
        }
        progress(format!("  CPU: {total:.3} s for 1,000 orders"));
        figures.insert("cpu_s_per_1000_orders".to_owned(), total);
        Ok(saturation)
    }

    fn cpu(&mut self) -> anyhow::Result<Vec<f64>> {
        usage::PARTS
            .into_iter()
            .map(|part| usage::cpu_seconds(&mut self.stack.system, part))
            .collect()
    }

    /// Orders per second that payments decides and answers when all requests are in the stream.
    async fn backlog(&mut self, figures: &mut Figures) -> anyhow::Result<()> {
        let Self {
            stack,
            http,
            databases,
            ..
        } = self;
        let system = &mut stack.system;
        let last: DecidedAt = one(
            &databases.payments,
            "SELECT max(decided_at) AS at FROM payments",
        )
        .await?;
        system.stop("payments").await?;
        load::place_all(http, BACKLOG).await?;
        load::until(
            &databases.orders,
            "SELECT NOT EXISTS (SELECT 1 FROM outbox WHERE published_at IS NULL)",
        )
        .await?;
        // It would use part of the machine.
        system.stop("orders").await?;
        let broker = operator(system).await?;
        let answers = async || {
            anyhow::Ok(
                broker
                    .jetstream()
                    .get_stream("PAYMENTS")
                    .await?
                    .cached_info()
                    .state
                    .last_sequence,
            )
        };
        let answers_before = answers().await?;
        let before = ["postgres", "nats"].map(|part| usage::cpu_seconds(system, part));
        system.start("payments").await?;
        // Counts in the broker, which costs it nothing. Counting in the database would slow it
        // down.
        let begun = Instant::now();
        while answers().await? < answers_before + BACKLOG as u64 {
            anyhow::ensure!(
                begun.elapsed() < load::SETTLED_WITHIN,
                "not all orders were answered within {:?}",
                load::SETTLED_WITHIN
            );
            tokio::time::sleep(load::POLL_INTERVAL).await;
        }
        let since = last.at.map_or_else(
            || "'-infinity'".to_owned(),
            |at| format!("to_timestamp({})", at.unix_timestamp_nanos() as f64 / 1e9),
        );
        let all =
            format!("FROM payments p JOIN outbox o USING (event_id) WHERE p.decided_at > {since}");
        load::until(
            &databases.payments,
            "SELECT NOT EXISTS (SELECT 1 FROM outbox WHERE published_at IS NULL)",
        )
        .await?;
        let query = format!(
            "SELECT count(*) / extract(epoch FROM max(o.published_at) - min(p.decided_at))::float8 AS rate {all}"
        );
        let Rate { rate } = one(&databases.payments, &query).await?;
        progress(format!(
            "  backlog: {rate:.0} orders/s decided and answered"
        ));
        figures.insert("drain_decisions_per_s".to_owned(), rate);
        for (part, before) in ["postgres", "nats", "payments"]
            .into_iter()
            .zip(before.into_iter().chain([Ok(0.0)]))
        {
            let per_thousand =
                (usage::cpu_seconds(system, part)? - before?) * 1000.0 / BACKLOG as f64;
            figures.insert(format!("drain_cpu_{part}_s_per_1000_orders"), per_thousand);
        }
        system.start("orders").await?;
        load::until_settled(&databases.orders).await
    }

    async fn with_replicas(&mut self) -> anyhow::Result<Saturation> {
        let ports = Ports::free()?;
        let system: &System = &self.stack.system;
        let mut replicas = Vec::new();
        for service in [Service::Orders, Service::Payments, Service::Gateway] {
            replicas.push(Process::start(&system.replica(service, &ports))?);
        }
        let second = Http::new(format!("http://127.0.0.1:{}", ports.gateway));
        for port in [ports.orders, ports.payments, ports.gateway] {
            let http = Http::new(format!("http://127.0.0.1:{port}"));
            let ready = async || {
                http.get("/readyz")
                    .await
                    .ok()
                    .filter(|answer| answer.status == 200)
            };
            eventually("the replicas are ready", SOON, ready).await;
        }
        let gateways = [self.http.clone(), second];
        let result =
            load::saturate(&gateways, &self.databases.orders, load::USERS, self.time).await;
        for replica in replicas {
            replica.stop().await?;
        }
        result
    }
}

#[derive(FromQueryResult)]
struct DecidedAt {
    at: Option<sea_orm::prelude::TimeDateTimeWithTimeZone>,
}

#[derive(FromQueryResult)]
struct Rate {
    rate: f64,
}

async fn one<T: FromQueryResult>(db: &DatabaseConnection, query: &str) -> anyhow::Result<T> {
    T::find_by_statement(Statement::from_string(DbBackend::Postgres, query))
        .one(db)
        .await?
        .context("an aggregate has one row")
}
