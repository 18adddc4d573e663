//! `just chaos --seed N`: breaks everything while customers order, and says whether the promise was kept.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;

use settings::Settings;

mod nemesis;
mod report;
mod run;
mod settings;

/// Breaks everything while customers order. Exit code 0 only if everything holds and every kind of fault happened.
#[derive(Parser)]
struct Arguments {
    /// Decides what happens and when. Timing differs from run to run, the schedule does not.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How long.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Orders over that time; 28 a second if not said.
    #[arg(long)]
    orders: Option<u64>,
    /// Deposits over that time; 3 a second if not said.
    #[arg(long)]
    deposits: Option<u64>,
    /// Only faults whose name contains this; may be repeated.
    #[arg(long)]
    only: Vec<String>,
    /// More environment for the services, NAME=VALUE; may be repeated.
    #[arg(long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Folder with the programs; that of this one if not said.
    #[arg(long)]
    binaries: Option<PathBuf>,
    /// Writes report.md, report.json and history.jsonl into this folder.
    #[arg(long)]
    report: Option<PathBuf>,
    /// The report as JSON on the standard output.
    #[arg(long)]
    json: bool,
}

// One thread: the processes of a stack end when the thread that started them does.
#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let binaries = match arguments.binaries {
        Some(folder) => folder,
        None => std::env::current_exe()?
            .parent()
            .context("this program is in a folder")?
            .to_owned(),
    };
    let mut settings = Settings::new(arguments.seed, arguments.seconds, binaries);
    settings.orders = arguments.orders.unwrap_or(settings.orders);
    settings.deposits = arguments.deposits.unwrap_or(settings.deposits);
    settings.only = arguments.only;
    for variable in &arguments.env {
        let (name, value) = variable
            .split_once('=')
            .with_context(|| format!("{variable:?} is not NAME=VALUE"))?;
        settings
            .environment
            .push((name.to_owned(), value.to_owned()));
    }
    if let Some(folder) = &arguments.report {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("{} cannot be made", folder.display()))?;
        settings.history = Some(folder.join("history.jsonl"));
    }
    let report = run::run(&settings).await?;
    let json = serde_json::to_string_pretty(&report)?;
    if let Some(folder) = &arguments.report {
        std::fs::write(folder.join("report.md"), report.to_string())?;
        std::fs::write(folder.join("report.json"), format!("{json}\n"))?;
    }
    if arguments.json {
        println!("{json}");
    } else {
        print!("{report}");
    }
    Ok(if report.holds() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
