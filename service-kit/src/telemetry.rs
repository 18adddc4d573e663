//! Logs: one readable line per event, with its facts as searchable fields.

use std::io::IsTerminal as _;

use clap::ValueEnum;
use tracing::Level;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{Layer as _, fmt};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Text,
    /// One JSON object per line.
    Json,
}

/// Starts logging to standard error. `filter` is a level or a list such as `info,orders=debug`.
pub fn init(format: LogFormat, filter: &str) -> anyhow::Result<()> {
    let filter: Targets = filter
        .parse()
        .map_err(|error| anyhow::anyhow!("RUST_LOG is not a valid filter: {error}"))?;
    // async_nats logs every reconnect attempt, the other two log at every start.
    let quiet = [
        ("async_nats", Level::ERROR),
        ("sea_orm_migration", Level::WARN),
        ("sqlx", Level::WARN),
    ];
    let filter = filter.with_targets(quiet);
    let layer = match format {
        LogFormat::Text => fmt::layer()
            .with_writer(std::io::stderr)
            .with_ansi(std::io::stderr().is_terminal())
            .boxed(),
        LogFormat::Json => fmt::layer()
            .json()
            .flatten_event(true)
            .with_writer(std::io::stderr)
            .boxed(),
    };
    // The filter is global. A filter of one layer sometimes drops lines: if a library only asks
    // whether a level is enabled (sqlx does so for each statement), the answer wrongly applies to
    // the next event.
    tracing_subscriber::registry()
        .with(filter)
        .with(layer)
        .try_init()?;
    Ok(())
}
