//! `gozon`: the operator's tool.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use async_nats::jetstream;
use clap::{Parser, Subcommand};
use messaging::broker::{Broker, BrokerConfig};
use messaging::config::TopologyArgs;
use ops::audit::{self, Databases, Options, Report};
use ops::dlq::{self, Letter};
use ops::look;
use sea_orm::{ConnectOptions, Database, DatabaseConnection};
use serde::Serialize;
use uuid::Uuid;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Looks into a running Gozon, checks it, and deals with dead letters.
#[derive(Parser)]
#[command(name = "gozon", version)]
struct Arguments {
    /// The database of orders.
    #[arg(long, env = "GOZON_ORDERS_DATABASE_URL", hide_env_values = true)]
    orders_database_url: String,
    /// The database of payments.
    #[arg(long, env = "GOZON_PAYMENTS_DATABASE_URL", hide_env_values = true)]
    payments_database_url: String,
    /// NATS servers, separated by commas.
    #[arg(long, env = "NATS_URL", default_value = "nats://127.0.0.1:4222")]
    nats_url: String,
    /// Password of the NATS user `ops`; only for what concerns the broker.
    #[arg(long, env = "NATS_OPS_PASSWORD", hide_env_values = true)]
    nats_ops_password: Option<String>,
    /// As JSON, for scripts.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Checks that orders, decisions, debits and balances fit together. Exit code 1 if they do not.
    Audit {
        /// A finding counts only if it still stands after so many seconds.
        #[arg(long, default_value_t = 5.0)]
        grace_seconds: f64,
        /// A NEW order is stuck when it is older than this.
        #[arg(long, default_value_t = Options::default().stuck_after.as_secs_f64())]
        stuck_after_seconds: f64,
    },
    /// Everything that both databases hold about an order.
    Order {
        /// Which.
        id: Uuid,
    },
    /// What waits to be published.
    Outbox,
    /// Streams and durable consumers: how far they are behind, and whether they differ from what this version would make.
    Topology {
        /// Makes what is absent and changes what differs.
        #[arg(long)]
        apply: bool,
        #[command(flatten)]
        settings: TopologyArgs,
    },
    /// Messages that were not applied.
    #[command(subcommand)]
    Dlq(Dlq),
}

#[derive(Subcommand)]
enum Dlq {
    /// Lists them.
    Ls,
    /// Shows one, with headers and body.
    Show {
        /// Which.
        id: Uuid,
    },
    /// Sends them again. What was applied meanwhile changes nothing.
    Replay {
        /// Which; all that wait if none is named.
        ids: Vec<Uuid>,
        /// Only says what it would do.
        #[arg(long)]
        dry_run: bool,
    },
    /// Takes one away for good.
    Drop {
        /// Which.
        id: Uuid,
    },
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(Arguments::parse()).await {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

async fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let databases = Databases {
        orders: connect(&arguments.orders_database_url).await.context("the database of orders cannot be reached")?,
        payments: connect(&arguments.payments_database_url).await.context("the database of payments cannot be reached")?,
    };
    let json = arguments.json;
    match &arguments.command {
        Command::Audit { grace_seconds, stuck_after_seconds } => {
            let options =
                Options { grace: seconds(*grace_seconds)?, stuck_after: seconds(*stuck_after_seconds)?, ..Options::default() };
            let begun = Instant::now();
            let report = audit::audit(&databases, options).await?;
            show(json, &report, |report| report_for_people(report, begun.elapsed()))?;
            return Ok(if report.findings.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        // A tree of rows: the same for people and scripts.
        Command::Order { id } => println!("{}", serde_json::to_string_pretty(&look::order(&databases, *id).await?)?),
        Command::Outbox => {
            show(json, &look::outboxes(&databases).await?, |outboxes| {
                let line = |one: &look::Outbox| {
                    format!(
                        "{:<9} {:>7} wait, the oldest for {:.1} s, tried {} times at most",
                        one.service, one.pending, one.oldest_seconds, one.attempts_max
                    )
                };
                outboxes.iter().map(line).collect::<Vec<_>>().join("\n")
            })?;
        }
        Command::Topology { apply, settings } => {
            let broker = broker(&arguments).await?;
            let parts = look::topology(broker.jetstream(), &settings.settings(), *apply).await?;
            show(json, &parts, |parts| topology_for_people(parts))?;
        }
        Command::Dlq(command) => return dead_letters(&arguments, &databases, command).await,
    }
    Ok(ExitCode::SUCCESS)
}

async fn dead_letters(arguments: &Arguments, databases: &Databases, command: &Dlq) -> anyhow::Result<ExitCode> {
    match command {
        Dlq::Ls => {
            show(arguments.json, &dlq::list(databases).await?, |letters| match letters.is_empty() {
                true => "There are no dead letters.".to_owned(),
                false => letters.iter().map(line).collect::<Vec<_>>().join("\n"),
            })?;
        }
        Dlq::Show { id } => {
            let letter = dlq::find(databases, *id).await?;
            let foreseen = dlq::foresee(databases, &letter).await?;
            show(arguments.json, &letter, |letter| {
                format!("{}\n\n{}\n{}\n\nA replay {foreseen}.", line(letter), letter.headers, letter.payload)
            })?;
        }
        Dlq::Replay { ids, dry_run } => {
            let mut letters = dlq::list(databases).await?;
            for id in ids {
                ensure!(letters.iter().any(|letter| letter.id == *id), "there is no dead letter {id}: gozon dlq ls shows them");
            }
            letters.retain(|letter| if ids.is_empty() { letter.waits } else { ids.contains(&letter.id) });
            let broker = if *dry_run { None } else { Some(broker(arguments).await?) };
            for letter in &letters {
                let foreseen = dlq::foresee(databases, letter).await?;
                match &broker {
                    None => println!("{} {foreseen}", letter.id),
                    Some(broker) => {
                        replay(databases, broker.jetstream(), letter).await?;
                        println!("{} sent again; it {foreseen}", letter.id);
                    }
                }
            }
            if letters.is_empty() {
                println!("No dead letter waits.");
            }
        }
        Dlq::Drop { id } => {
            let letter = dlq::find(databases, *id).await?;
            dlq::remove(databases, &letter).await?;
            println!("{id} is gone");
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn replay(databases: &Databases, jetstream: &jetstream::Context, letter: &Letter) -> anyhow::Result<()> {
    dlq::replay(databases, jetstream, letter).await.with_context(|| format!("dead letter {} was not sent again", letter.id))
}

async fn broker(arguments: &Arguments) -> anyhow::Result<Broker> {
    let password = arguments.nats_ops_password.clone().context("NATS_OPS_PASSWORD is not set, and this concerns the broker")?;
    let config = BrokerConfig { url: arguments.nats_url.clone(), user: "ops".to_owned(), password, name: "gozon".to_owned() };
    let broker = Broker::connect(config).await?;
    let connected = tokio::time::timeout(CONNECT_TIMEOUT, broker.until_connected()).await;
    connected.with_context(|| format!("NATS cannot be reached at {}, or refuses user ops", arguments.nats_url))?;
    Ok(broker)
}

fn show<T: Serialize>(json: bool, value: &T, for_people: impl FnOnce(&T) -> String) -> anyhow::Result<()> {
    match json {
        true => println!("{}", serde_json::to_string_pretty(value)?),
        false => println!("{}", for_people(value).trim_end()),
    }
    Ok(())
}

fn line(letter: &Letter) -> String {
    let state = if letter.waits { "waits" } else { "sent again" };
    format!(
        "{} {:<8} {:<10} {:<10} {:>3}x {}  {}",
        letter.id, letter.service, letter.kind, state, letter.times, letter.created_at, letter.cause
    )
}

fn topology_for_people(parts: &[look::Part]) -> String {
    let mut lines = Vec::new();
    for part in parts {
        let state = match (part.there, part.drift.is_empty()) {
            (false, _) => "absent".to_owned(),
            (true, true) => "as it should be".to_owned(),
            (true, false) => part.drift.join(", "),
        };
        lines.push(format!(
            "{:<33} {:>8} messages {:>6} unacked {:>6} redelivered  {state}",
            part.name, part.messages, part.ack_pending, part.redelivered
        ));
    }
    lines.join("\n")
}

fn seconds(number: f64) -> anyhow::Result<Duration> {
    Duration::try_from_secs_f64(number).with_context(|| format!("{number} is no number of seconds"))
}

async fn connect(url: &str) -> anyhow::Result<DatabaseConnection> {
    let mut options = ConnectOptions::new(url);
    options.max_connections(2).sqlx_logging(false).connect_timeout(CONNECT_TIMEOUT);
    Ok(Database::connect(options).await?)
}

fn report_for_people(report: &Report, took: Duration) -> String {
    let mut text = format!(
        "{} orders ({}), {} decisions, {} transfers, {} accounts in {:.1} s\n",
        report.orders,
        report.by_status.iter().map(|(status, number)| format!("{number} {status}")).collect::<Vec<_>>().join(", "),
        report.decisions,
        report.transfers,
        report.accounts,
        took.as_secs_f64()
    );
    for finding in &report.findings {
        text.push_str(&format!("  {:<22} {}  {}\n", finding.kind, finding.id, finding.detail));
    }
    text.push_str(&match report.findings.len() {
        0 => "Everything fits together.\n".to_owned(),
        number => format!("{number} findings.\n"),
    });
    text
}
