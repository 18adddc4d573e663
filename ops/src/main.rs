//! `gozon`: the operator's tool.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use broker::{Broker, BrokerConfig};
use clap::{Parser, Subcommand};
use messaging::TopologySettings;
use ops::audit::{self, CompareWith, Databases, Options};
use ops::history::History;
use ops::topology::Apply;
use ops::{dead_letters, order, outbox, streams, topology};
use sea_orm::{ConnectOptions, Database, DatabaseConnection};
use serde::Serialize;
use service_kit::config::Secret;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

mod show;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Inspects and audits a running Gozon, and handles dead letters.
#[derive(Parser)]
#[command(name = "gozon", version)]
struct Arguments {
    /// PostgreSQL URL of the orders database.
    #[arg(long, env = "GOZON_ORDERS_DATABASE_URL", hide_env_values = true)]
    orders_database_url: Option<Secret>,
    /// PostgreSQL URL of the payments database.
    #[arg(long, env = "GOZON_PAYMENTS_DATABASE_URL", hide_env_values = true)]
    payments_database_url: Option<Secret>,
    /// NATS servers, separated by commas.
    #[arg(long, env = "NATS_URL", default_value = "nats://127.0.0.1:4222")]
    nats_url: String,
    /// Password of the NATS user `ops`. Only commands that use the broker need it.
    #[arg(long, env = "NATS_OPS_PASSWORD", hide_env_values = true)]
    nats_ops_password: Option<Secret>,
    /// Print JSON.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Check that orders, decisions, debits, balances and streams are consistent.
    ///
    /// Exit code 1 if there are findings, 2 if the audit could not run.
    Audit {
        /// Time before a second pass, which must confirm each finding.
        #[arg(long, default_value_t = 5.0)]
        grace_seconds: f64,
        /// Age from which a NEW order counts as stuck.
        #[arg(long, default_value_t = Options::default().stuck_after.as_secs_f64())]
        stuck_after_seconds: f64,
        /// Recorded exchanges of a client with the API, one JSON object per line, to compare with.
        #[arg(long, value_name = "FILE")]
        history: Option<PathBuf>,
        /// Do not compare the databases with the streams.
        #[arg(long)]
        no_streams: bool,
    },
    /// Show all rows about an order, from both databases.
    Order { id: Uuid },
    /// Show how many messages are pending, or publish old messages again.
    Outbox {
        #[command(subcommand)]
        command: Option<OutboxCommand>,
    },
    /// List the streams with their sizes.
    Streams,
    /// List the consumers with their lag.
    Consumers {
        /// Only the consumers of this stream.
        stream: Option<String>,
    },
    /// Show the newest messages of a stream.
    Peek {
        #[arg(default_value = "ORDERS")]
        stream: String,
        /// Number of messages.
        #[arg(default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=10_000))]
        count: u64,
        /// Only messages on this subject.
        #[arg(long)]
        subject: Option<String>,
    },
    /// Follow a stream: show new messages as they arrive.
    Tail {
        #[arg(default_value = "ORDERS")]
        stream: String,
        /// Only messages on this subject.
        #[arg(long)]
        subject: Option<String>,
    },
    /// Compare streams and durable consumers with what this version creates.
    ///
    /// Also shows their backlog. The settings must be those of the services. Exit code 1 if a
    /// stream or consumer differs or is missing.
    Topology {
        /// Create what is missing and change what differs.
        #[arg(long)]
        apply: bool,
        /// Also make streams smaller or reduce their number of replicas.
        #[arg(long, requires = "apply")]
        shrink: bool,
        #[command(flatten)]
        settings: TopologySettings,
    },
    /// List, replay and drop dead letters: messages that were not applied.
    #[command(subcommand)]
    Dlq(DlqCommand),
}

#[derive(Subcommand)]
enum OutboxCommand {
    /// Publish old messages again, under the same ids.
    ///
    /// Use it after the broker has lost messages that other readers of order events need. Use it
    /// with subject gozon.orders.placed after payments was restored from a backup. The services
    /// ignore messages that they have already applied.
    Resend {
        /// Messages published since this time, for example 2026-11-21T10:00:00Z.
        #[arg(long, value_parser = time)]
        since: OffsetDateTime,
        /// Only messages on this subject, for example gozon.orders.finished.
        #[arg(long)]
        subject: Option<String>,
        /// Only count the messages.
        #[arg(long)]
        dry_run: bool,
        /// Duplicate window of the broker, as configured for the services.
        #[arg(long, env = "GOZON_DUPLICATE_WINDOW_MS", default_value_t = 120_000)]
        duplicate_window_ms: u64,
    },
}

#[derive(Subcommand)]
enum DlqCommand {
    /// List dead letters.
    Ls,
    /// Show a dead letter with headers and body, and what a replay would do.
    Show { id: Uuid },
    /// Apply dead letters again. A message that was applied meanwhile has no effect.
    Replay {
        /// Dead letters to replay; all unresolved ones if none is given.
        ids: Vec<Uuid>,
        /// Only show what a replay would do.
        #[arg(long)]
        dry_run: bool,
    },
    /// Delete a dead letter for good.
    Drop { id: Uuid },
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
    let json = arguments.json;
    match &arguments.command {
        Command::Audit {
            grace_seconds,
            stuck_after_seconds,
            history,
            no_streams,
        } => {
            let options = Options {
                grace: seconds(*grace_seconds)?,
                stuck_after: seconds(*stuck_after_seconds)?,
                ..Options::default()
            };
            let begun = Instant::now();
            let history = history.as_deref().map(History::read).transpose()?;
            let databases = databases(&arguments).await?;
            let broker = if *no_streams {
                None
            } else {
                Some(broker(&arguments).await)
            };
            let streams = broker
                .as_ref()
                .and_then(|broker| broker.as_ref().ok())
                .map(Broker::jetstream);
            let mut report = audit::audit_with(
                &databases,
                options,
                CompareWith {
                    streams,
                    history: history.as_ref(),
                },
            )
            .await?;
            if let Some(Err(error)) = &broker {
                report.not_looked_at.push(format!("the streams: {error:#}"));
            }
            print(json, &report, |report| {
                show::report(report, begun.elapsed())
            })?;
            return Ok(if report.findings.is_empty() {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            });
        }
        Command::Order { id } => {
            print(
                json,
                &order::find(&databases(&arguments).await?, *id).await?,
                show::order,
            )?;
        }
        Command::Outbox { command: None } => {
            print(
                json,
                &outbox::status(&databases(&arguments).await?).await?,
                |outboxes| show::outboxes(outboxes),
            )?;
        }
        Command::Outbox {
            command:
                Some(OutboxCommand::Resend {
                    since,
                    subject,
                    dry_run,
                    duplicate_window_ms,
                }),
        } => {
            let window = Duration::from_millis(*duplicate_window_ms);
            let resent = outbox::resend(
                &databases(&arguments).await?,
                *since,
                subject.as_deref(),
                *dry_run,
                window,
            )
            .await?;
            print(json, &resent, |resent| show::resent(resent, *dry_run))?;
        }
        Command::Streams => {
            let streams = streams::list(broker(&arguments).await?.jetstream()).await?;
            print(json, &streams, |streams| show::streams(streams))?;
        }
        Command::Consumers { stream } => {
            let consumers =
                streams::consumers(broker(&arguments).await?.jetstream(), stream.as_deref())
                    .await?;
            print(json, &consumers, |consumers| show::consumers(consumers))?;
        }
        Command::Peek {
            stream,
            count,
            subject,
        } => {
            let messages = streams::peek(
                broker(&arguments).await?.jetstream(),
                stream,
                *count,
                subject.as_deref(),
            )
            .await?;
            print(json, &messages, |messages| match messages.is_empty() {
                true => "There are no messages.".to_owned(),
                false => messages
                    .iter()
                    .map(show::message)
                    .collect::<Vec<_>>()
                    .join("\n\n"),
            })?;
        }
        Command::Tail { stream, subject } => {
            let broker = broker(&arguments).await?;
            // With --json, one line per message, so that a script can read each when it arrives.
            let follow = streams::tail(broker.jetstream(), stream, subject.as_deref(), |message| {
                let text = match json {
                    true => serde_json::to_string(&message).unwrap_or_default(),
                    false => show::message(&message) + "\n",
                };
                // Writing fails when the reader has gone, as in `gozon tail | head`.
                writeln!(std::io::stdout(), "{text}").is_ok()
            });
            tokio::select! {
                followed = follow => followed?,
                interrupted = tokio::signal::ctrl_c() => interrupted?,
            }
        }
        Command::Topology {
            apply,
            shrink,
            settings,
        } => {
            let broker = broker(&arguments).await?;
            let apply = match (apply, shrink) {
                (false, _) => Apply::CheckOnly,
                (true, false) => Apply::Grow,
                (true, true) => Apply::Shrink,
            };
            let items = topology::check(broker.jetstream(), settings, apply).await?;
            print(json, &items, |items| show::topology(items))?;
            if items
                .iter()
                .any(|item| !item.there || !item.drift.is_empty())
            {
                return Ok(ExitCode::FAILURE);
            }
        }
        Command::Dlq(command) => {
            return run_dlq(&arguments, &databases(&arguments).await?, command).await;
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn databases(arguments: &Arguments) -> anyhow::Result<Databases> {
    let orders = arguments
        .orders_database_url
        .as_ref()
        .context("GOZON_ORDERS_DATABASE_URL is not set")?;
    let payments = arguments
        .payments_database_url
        .as_ref()
        .context("GOZON_PAYMENTS_DATABASE_URL is not set")?;
    Ok(Databases {
        orders: connect(orders.expose())
            .await
            .context("cannot connect to the orders database")?,
        payments: connect(payments.expose())
            .await
            .context("cannot connect to the payments database")?,
    })
}

async fn run_dlq(
    arguments: &Arguments,
    databases: &Databases,
    command: &DlqCommand,
) -> anyhow::Result<ExitCode> {
    match command {
        DlqCommand::Ls => {
            print(
                arguments.json,
                &dead_letters::list(databases).await?,
                |letters| match letters.is_empty() {
                    true => "There are no dead letters.".to_owned(),
                    false => letters
                        .iter()
                        .map(show::dead_letter)
                        .collect::<Vec<_>>()
                        .join("\n"),
                },
            )?;
        }
        DlqCommand::Show { id } => {
            let letter = dead_letters::find(databases, *id).await?;
            let dry_run = dead_letters::replay(databases, &letter, true).await?;
            print(arguments.json, &letter, |letter| {
                format!(
                    "{}\n\n{}\n{}\n\nOutcome of a replay: {}. {}",
                    show::dead_letter(letter),
                    letter.headers,
                    letter.payload,
                    dry_run.outcome,
                    dry_run.detail
                )
            })?;
        }
        DlqCommand::Replay { ids, dry_run } => {
            let mut letters = dead_letters::list(databases).await?;
            for id in ids {
                ensure!(
                    letters.iter().any(|one| one.id == *id),
                    "there is no dead letter {id}: gozon dlq ls lists them"
                );
            }
            letters.retain(|one| match ids.is_empty() {
                true => one.waits,
                false => ids.contains(&one.id),
            });
            // Oldest first, in the order of arrival.
            letters.reverse();
            let (mut replays, mut result) = (Vec::new(), Ok(()));
            for letter in &letters {
                match dead_letters::replay(databases, letter, *dry_run).await {
                    Ok(replay) => replays.push(replay),
                    Err(error) => {
                        result = Err(error);
                        break;
                    }
                }
            }
            // After an error, also print what was replayed before it.
            print(arguments.json, &replays, |replays| show::replays(replays))?;
            result?;
        }
        DlqCommand::Drop { id } => {
            let letter = dead_letters::find(databases, *id).await?;
            dead_letters::remove(databases, &letter).await?;
            print(
                arguments.json,
                &serde_json::json!({ "id": id, "gone": true }),
                |_| format!("Dropped dead letter {id}."),
            )?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn broker(arguments: &Arguments) -> anyhow::Result<Broker> {
    let password = arguments
        .nats_ops_password
        .clone()
        .context("NATS_OPS_PASSWORD is not set; this command uses the broker")?;
    let config = BrokerConfig {
        url: arguments.nats_url.clone(),
        user: "ops".to_owned(),
        password,
        name: "gozon".to_owned(),
    };
    let broker = Broker::connect(config).await?;
    let connected = tokio::time::timeout(CONNECT_TIMEOUT, broker.until_connected()).await;
    connected.with_context(|| {
        format!(
            "NATS at {} cannot be reached, or rejects user ops",
            arguments.nats_url
        )
    })?;
    Ok(broker)
}

fn print<T: Serialize>(
    json: bool,
    value: &T,
    for_people: impl FnOnce(&T) -> String,
) -> anyhow::Result<()> {
    match json {
        true => println!("{}", serde_json::to_string_pretty(value)?),
        false => println!("{}", for_people(value).trim_end()),
    }
    Ok(())
}

fn time(text: &str) -> Result<OffsetDateTime, String> {
    OffsetDateTime::parse(text, &Rfc3339)
        .map_err(|_| "must be a time such as 2026-11-21T10:00:00Z".to_owned())
}

fn seconds(number: f64) -> anyhow::Result<Duration> {
    Duration::try_from_secs_f64(number)
        .with_context(|| format!("{number} is not a valid number of seconds"))
}

async fn connect(url: &str) -> anyhow::Result<DatabaseConnection> {
    let mut options = ConnectOptions::new(url);
    options
        .max_connections(2)
        .sqlx_logging(false)
        .connect_timeout(CONNECT_TIMEOUT);
    Ok(Database::connect(options).await?)
}
