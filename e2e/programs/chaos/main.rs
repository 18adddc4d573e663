//! `./dev chaos --seed N`: injects every kind of fault while customers order, and checks the
//! promise.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;

use settings::Settings;

mod nemesis;
mod report;
mod run;
mod settings;

/// Injects every kind of fault while customers order. Exit code 0 only if the promise is kept and
/// every kind of fault happened.
#[derive(Parser)]
struct Arguments {
    /// Determines the schedule of faults and requests. Exact timing differs from run to run.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Duration of the load and the faults in seconds.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Orders during that time; by default 28 per second.
    #[arg(long)]
    orders: Option<u64>,
    /// Deposits during that time; by default 3 per second.
    #[arg(long)]
    deposits: Option<u64>,
    /// Only faults whose name contains this; may be repeated.
    #[arg(long)]
    only: Vec<String>,
    /// Additional environment of the services, NAME=VALUE; may be repeated.
    #[arg(long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// The folder with the programs; by default that of this one.
    #[arg(long)]
    binaries: Option<PathBuf>,
    /// Write report.md, report.json and history.jsonl into this folder.
    #[arg(long)]
    report: Option<PathBuf>,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

// One thread: the kernel ends the processes of a stack when the thread that started them ends.
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
            .with_context(|| format!("{} cannot be created", folder.display()))?;
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
