//! `just bench`: how fast it is, against what the database and the broker can do in the same run.
//!
//! Everything that is compared is measured in turns, so that a noisy moment hits all alike; the medians of the runs
//! count. A run in which an order is turned away, or after which the audit finds anything, is a failed run.

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

/// Orders in the backlog that payments works off.
const BACKLOG: usize = 20_000;
const ORDERS_PER_SECOND: u32 = 100;
/// Processor time at rest is counted in hundredths of a second, so it takes a while until there is something to count.
const REST: Duration = Duration::from_secs(40);
/// The allocator keeps what it once had; what grows for ever grows by more.
const SOAK_GROWTH_MAX_MIB: f64 = 8.0;
const SOON: Duration = Duration::from_secs(60);

/// Measures how fast the whole system is.
#[derive(Parser)]
struct Arguments {
    /// How often everything is measured; the medians count.
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// How long one measurement takes.
    #[arg(long, default_value_t = 8)]
    seconds: u64,
    /// Measures end to end and the backlog, fills the tables with so many orders, and compares all that follows with it.
    #[arg(long, default_value_t = 0)]
    prefilled: u64,
    /// Measures nothing but these parts.
    #[arg(long, value_enum, value_delimiter = ',', conflicts_with = "report")]
    only: Vec<Part>,
    /// Also shows which statements take how much of PostgreSQL's time; that costs a little itself.
    #[arg(long)]
    statements: bool,
    /// Another setting for PostgreSQL, to see what it is good for: `name=value`.
    #[arg(long = "set", conflicts_with = "report")]
    settings: Vec<String>,
    /// Where the report goes; `latest.json` goes to target/bench in any case.
    #[arg(long)]
    report: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// What PostgreSQL and NATS can do by themselves
    Floor,
    /// payments works off what lies in the stream
    Backlog,
    /// As many orders as can be taken, through HTTP
    Saturation,
    /// The same on one account
    Hot,
    /// The same with two replicas of each service
    Replicas,
    /// 100 orders a second
    Latency,
    /// Nothing is asked of it
    Rest,
    /// 100 orders a second for so long that growing memory would show; only when it is named
    Soak,
}

/// Figures by name, each with its unit in the name.
type Figures = BTreeMap<String, f64>;

/// What is measured.
struct Bench {
    stack: TestStack,
    http: Http,
    databases: Databases,
    time: Duration,
    only: Vec<Part>,
}

/// What the plots show, of the last run.
#[derive(Default)]
struct Plotted {
    latencies: Vec<f64>,
    saturation: Saturation,
}

// One thread: the processes of a stack end when the thread that started them does.
#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let program = std::env::current_exe()?;
    let binaries = program.parent().context("this program is in a folder")?;
    ensure!(
        !cfg!(debug_assertions),
        "a debug build measures nothing: run `just bench`"
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
    say("durable: fsync, synchronous_commit and sync_interval are as they should be");
    // Before all else: after load, the database still tidies up.
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
    say("warm");
    let mut empty = Vec::new();
    if arguments.prefilled > 0 {
        for number in 1..=arguments.runs {
            say(format!("empty tables, run {number} of {}", arguments.runs));
            let mut figures = Figures::new();
            bench.backlog(&mut figures).await?;
            bench.saturation(&mut figures).await?;
            empty.push(figures);
        }
        say(format!(
            "filling the tables with {} orders ...",
            arguments.prefilled
        ));
        bench.prefill(arguments.prefilled).await?;
    }
    if arguments.statements {
        statements::forget(&bench.databases).await?;
    }

    let mut runs = Vec::new();
    let mut plotted = Plotted::default();
    for number in 1..=arguments.runs {
        say(format!("run {number} of {}", arguments.runs));
        let mut figures = Figures::new();
        plotted = bench.run(&mut figures).await?;
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
        "fast, but wrong: {:?}",
        found.findings
    );
    ensure!(
        found.not_looked_at.is_empty(),
        "not audited: {}",
        found.not_looked_at.join("; ")
    );
    say(format!(
        "audit: {} orders, databases and streams fit together",
        found.orders
    ));
    report::write(&figures, &plotted, binaries, arguments.report.as_deref())
}

fn say(text: impl std::fmt::Display) {
    eprintln!("{text}");
}

impl Bench {
    /// Durability is never traded: what would make the figures worthless stops the run.
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

    /// Old orders of one customer, all of them declined, with everything that is kept for ever.
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
        // Old orders were written out and vacuumed long ago; otherwise just that would be measured.
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

    /// One turn of everything.
    async fn run(&mut self, figures: &mut Figures) -> anyhow::Result<Plotted> {
        let mut plotted = Plotted::default();
        if self.measures(Part::Floor) {
            self.floors(figures).await?;
        }
        if self.measures(Part::Backlog) {
            self.backlog(figures).await?;
        }
        // What the other two are compared with.
        if self.measures(Part::Saturation)
            || self.measures(Part::Hot)
            || self.measures(Part::Replicas)
        {
            plotted.saturation = self.saturation(figures).await?;
        }
        if self.measures(Part::Hot) {
            let hot = load::saturate(
                std::slice::from_ref(&self.http),
                &self.databases.orders,
                1,
                self.time,
            )
            .await?;
            let ratio = hot.finished_per_s / plotted.saturation.finished_per_s;
            say(format!(
                "  one account: {:.0} orders/s, {ratio:.2} of {} accounts",
                hot.finished_per_s,
                load::USERS
            ));
            figures.insert("hot_account_finished_per_s".to_owned(), hot.finished_per_s);
            figures.insert("hot_account_ratio".to_owned(), ratio);
        }
        if self.measures(Part::Replicas) {
            let twice = self.with_replicas().await?;
            let ratio = twice.finished_per_s / plotted.saturation.finished_per_s;
            say(format!(
                "  two replicas of each service: {:.0} orders/s, {ratio:.2} of one",
                twice.finished_per_s
            ));
            figures.insert("replicas_finished_per_s".to_owned(), twice.finished_per_s);
            figures.insert("replicas_ratio".to_owned(), ratio);
        }
        if self.measures(Part::Latency) {
            let waited = load::open_loop(&self.http, ORDERS_PER_SECOND, self.time).await?;
            plotted.latencies = waited.iter().map(load::Waited::milliseconds).collect();
            plotted.latencies.sort_by(f64::total_cmp);
            let [p50, p99] = [0.5, 0.99].map(|share| report::percentile(&plotted.latencies, share));
            say(format!(
                "  at {ORDERS_PER_SECOND} orders/s: {p50:.1} ms p50, {p99:.1} ms p99 from POST to FINISHED"
            ));
            figures.insert("latency_100_p50_ms".to_owned(), p50);
            figures.insert("latency_100_p99_ms".to_owned(), p99);
            for (leg, median) in legs::LEGS
                .into_iter()
                .zip(legs::medians(&self.databases, &waited).await?)
            {
                say(format!("    {leg}: {median:.2} ms"));
                figures.insert(format!("latency_100_{leg}_ms"), median);
            }
        }
        if self.only.contains(&Part::Soak) {
            self.soak(figures).await?;
        }
        Ok(plotted)
    }

    /// What it costs to be there.
    async fn rest(&mut self, figures: &mut Figures) -> anyhow::Result<()> {
        let before = self.cpu()?;
        tokio::time::sleep(REST).await;
        let mut all = 0.0;
        for (part, (before, after)) in usage::PARTS
            .into_iter()
            .zip(before.into_iter().zip(self.cpu()?))
        {
            let percent = (after - before) * 100.0 / REST.as_secs_f64();
            say(format!("  at rest: {part} takes {percent:.2} % of a core"));
            figures.insert(format!("rest_cpu_{part}_percent_of_a_core"), percent);
            all += percent;
        }
        figures.insert("rest_cpu_percent_of_a_core".to_owned(), all);
        Ok(())
    }

    /// Memory at the end of a long time against that after its first quarter.
    async fn soak(&mut self, figures: &mut Figures) -> anyhow::Result<()> {
        load::open_loop(&self.http, ORDERS_PER_SECOND, self.time / 4).await?;
        let before = self.memory()?;
        load::open_loop(&self.http, ORDERS_PER_SECOND, self.time * 3 / 4).await?;
        for (part, (before, after)) in usage::PARTS
            .into_iter()
            .zip(before.into_iter().zip(self.memory()?))
        {
            say(format!(
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
            say(format!(
                "  floor: {rate:.0} debits/s, one a transaction, {clients} clients"
            ));
            figures.insert(format!("floor_c{clients}_debits_per_s"), rate);
        }
        let rate = floor::publishes(&self.stack.system, time).await?;
        say(format!(
            "  floor: {rate:.0} messages/s acknowledged by the broker, one by one"
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
        say(format!(
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
        say(format!("  CPU: {total:.3} s for 1,000 orders"));
        figures.insert("cpu_s_per_1000_orders".to_owned(), total);
        Ok(saturation)
    }

    fn cpu(&mut self) -> anyhow::Result<Vec<f64>> {
        usage::PARTS
            .into_iter()
            .map(|part| usage::cpu_seconds(&mut self.stack.system, part))
            .collect()
    }

    /// Orders a second that payments decides and whose answers it publishes, when they all lie ready in the stream.
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
        // It would take a share of the machine.
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
        // The broker is asked, for whom counting is nothing: the database would be kept from what is measured.
        let begun = Instant::now();
        while answers().await? < answers_before + BACKLOG as u64 {
            anyhow::ensure!(
                begun.elapsed() < load::SETTLED_WITHIN,
                "not all were answered within {:?}",
                load::SETTLED_WITHIN
            );
            tokio::time::sleep(load::LOOK_INTERVAL).await;
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
        say(format!(
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
        let doors = [self.http.clone(), second];
        let result = load::saturate(&doors, &self.databases.orders, load::USERS, self.time).await;
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
