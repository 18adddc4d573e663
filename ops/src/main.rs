//! `gozon`: the operator's tool.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use ops::audit::{self, Databases, Options, Report};
use sea_orm::{ConnectOptions, Database, DatabaseConnection};

/// Looks into a running Gozon and checks it.
#[derive(Parser)]
#[command(name = "gozon", version)]
struct Arguments {
    /// The database of orders.
    #[arg(long, env = "GOZON_ORDERS_DATABASE_URL", hide_env_values = true)]
    orders_database_url: String,
    /// The database of payments.
    #[arg(long, env = "GOZON_PAYMENTS_DATABASE_URL", hide_env_values = true)]
    payments_database_url: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Checks that orders, decisions, debits and balances fit together. Exit code 1 if they do not.
    Audit {
        /// As JSON.
        #[arg(long)]
        json: bool,
        /// A finding counts only if it still stands after so many seconds.
        #[arg(long, default_value_t = 5.0)]
        grace_seconds: f64,
        /// A NEW order is stuck when it is older than this.
        #[arg(long, default_value_t = Options::default().stuck_after.as_secs_f64())]
        stuck_after_seconds: f64,
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
    match arguments.command {
        Command::Audit { json, grace_seconds, stuck_after_seconds } => {
            let options =
                Options { grace: seconds(grace_seconds)?, stuck_after: seconds(stuck_after_seconds)?, ..Options::default() };
            let begun = Instant::now();
            let report = audit::audit(&databases, options).await?;
            match json {
                true => println!("{}", serde_json::to_string_pretty(&report)?),
                false => print!("{}", for_people(&report, begun.elapsed())),
            }
            Ok(if report.findings.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
    }
}

fn seconds(number: f64) -> anyhow::Result<Duration> {
    Duration::try_from_secs_f64(number).with_context(|| format!("{number} is no number of seconds"))
}

async fn connect(url: &str) -> anyhow::Result<DatabaseConnection> {
    let mut options = ConnectOptions::new(url);
    options.max_connections(2).sqlx_logging(false).connect_timeout(Duration::from_secs(5));
    Ok(Database::connect(options).await?)
}

fn for_people(report: &Report, took: Duration) -> String {
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
