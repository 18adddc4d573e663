//! `stack up` starts the whole system on this machine. `./dev` is its user interface.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use stack::ports::Ports;
use stack::process::tail;
use stack::{NAMES, Options, PartStatus, Request, StackFolder, System, Tools};

const DETACHED_START_TIMEOUT: Duration = Duration::from_secs(300);

/// Runs the whole system on this machine: PostgreSQL, NATS, orders, payments, gateway.
#[derive(Parser)]
#[command(name = "stack")]
struct Arguments {
    /// Folder for data, logs and passwords.
    #[arg(long, env = "GOZON_DIR", default_value = ".gozon")]
    dir: PathBuf,
    /// Number to add to every port, so that several stacks can run side by side.
    #[arg(long, env = "GOZON_PORT_OFFSET", default_value_t = 0)]
    port_offset: u16,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start everything and keep it running until Ctrl-C.
    Up {
        /// Return when everything is ready; `down` stops it.
        #[arg(short, long)]
        detach: bool,
    },
    /// Stop everything.
    Down,
    /// Start one part, and wait until it is ready.
    Start {
        /// postgres, nats, orders, payments or gateway
        name: String,
    },
    /// Stop one part until it is started again.
    Stop {
        /// postgres, nats, orders, payments or gateway
        name: String,
    },
    /// Show the state of every part.
    Status {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

// One thread: the kernel signals the processes of a stack when the thread that started them ends.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run(Arguments::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let folder = std::path::absolute(&arguments.dir)?;
    let ports = Ports::with_offset(arguments.port_offset)?;
    match arguments.command {
        Command::Up { detach: false } => up(&folder, ports).await,
        Command::Up { detach: true } => {
            up_detached(&folder, &arguments.dir, arguments.port_offset).await
        }
        Command::Down => match stack::ask(&folder, &Request::Down).await? {
            Some(_) => {
                println!(
                    "Everything is stopped. The data is kept in {}.",
                    folder.display()
                );
                Ok(())
            }
            None => {
                println!("Nothing is running in {}.", folder.display());
                Ok(())
            }
        },
        Command::Start { name } => ask_running(&folder, &Request::Start { name }).await,
        Command::Stop { name } => ask_running(&folder, &Request::Stop { name }).await,
        Command::Status { json } => {
            let parts = match stack::ask(&folder, &Request::Status).await? {
                Some(parts) => serde_json::from_value(parts)?,
                None => PartStatus::all_stopped(&folder, &ports),
            };
            match json {
                true => print_lines(&serde_json::to_string_pretty(&parts)?),
                false => print_lines(&status_table(&folder, &parts)),
            }
            Ok(())
        }
    }
}

async fn up(folder: &Path, ports: Ports) -> anyhow::Result<()> {
    let tools = Tools::find()?;
    let binaries = std::env::current_exe()?
        .parent()
        .context("the path of this program has no folder")?
        .to_owned();
    let folder = StackFolder::open(folder)?;
    println!("Starting in {}", folder.path().display());
    let options = Options {
        ports,
        binaries,
        environment: Vec::new(),
    };
    stack::supervise(&tools, folder, options, |system| {
        print_welcome(system);
        println!("Ctrl-C stops everything.");
    })
    .await
}

/// Starts this program again in a new session, and waits until it answers.
async fn up_detached(folder: &Path, dir: &Path, port_offset: u16) -> anyhow::Result<()> {
    if let Some(parts) = stack::ask(folder, &Request::Status).await? {
        println!("Already running.");
        print_lines(&status_table(
            folder,
            &serde_json::from_value::<Vec<PartStatus>>(parts)?,
        ));
        return Ok(());
    }
    let log_path = StackFolder::open(folder)?.log("stack");
    let log = std::fs::File::create(&log_path)?;
    let mut child = tokio::process::Command::new("setsid")
        .arg(std::env::current_exe()?)
        .arg("--dir")
        .arg(dir)
        .args(["--port-offset", &port_offset.to_string(), "up"])
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("the stack cannot be started in the background")?;
    let deadline = tokio::time::Instant::now() + DETACHED_START_TIMEOUT;
    loop {
        if let Some(status) = child.try_wait()? {
            let words = tail(&log_path, 30);
            let reason = words
                .split_once("error: ")
                .map_or(words.as_str(), |(_, reason)| reason);
            anyhow::bail!("{reason}\n(the stack ended with {status}; nothing runs)");
        }
        if stack::ask(folder, &Request::Status).await?.is_some() {
            print!(
                "{}",
                std::fs::read_to_string(&log_path)?.replace("Ctrl-C stops", "./dev down stops")
            );
            return Ok(());
        }
        anyhow::ensure!(
            tokio::time::Instant::now() < deadline,
            "not ready after {DETACHED_START_TIMEOUT:?}; see {}",
            log_path.display()
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn ask_running(folder: &Path, request: &Request) -> anyhow::Result<()> {
    stack::ask(folder, request).await?.with_context(|| {
        format!(
            "nothing is running in {}: ./dev up starts it",
            folder.display()
        )
    })?;
    Ok(())
}

fn status_table(folder: &Path, parts: &[PartStatus]) -> String {
    let mut lines = vec![format!(
        "{:<9} {:<7} {:<8} {:<28} log",
        "part", "ready", "pid", "address"
    )];
    for part in parts {
        let pid = part
            .pid
            .map_or_else(|| "-".to_owned(), |pid| pid.to_string());
        let ready = if part.ready { "yes" } else { "no" };
        lines.push(format!(
            "{:<9} {ready:<7} {pid:<8} {:<28} {}",
            part.name, part.address, part.log
        ));
    }
    lines.push(format!("data and logs: {}", folder.display()));
    lines.join("\n")
}

fn print_lines(text: &str) {
    // Printing fails if the reader has closed the pipe: `./dev status | head -n 1`.
    let _ = writeln!(std::io::stdout(), "{text}");
}

fn print_welcome(system: &System) {
    let gateway = system.address("gateway");
    println!();
    for name in NAMES {
        println!("  {name:<9} {}", system.address(name));
    }
    println!("  {:<9} {gateway}/swagger/", "API");
    println!(
        "  {:<9} http://127.0.0.1:{}",
        "monitor",
        system.ports().nats_monitor
    );
    println!("  {:<9} {}", "data", system.folder().path().display());
    println!();
    println!("Try it:");
    println!(
        "  curl -s {gateway}/v1/accounts -H 'Content-Type: application/json' -d '{{\"user_id\":\"alice\"}}'"
    );
    println!(
        "  nats --server nats://viewer:{}@127.0.0.1:{} stream ls",
        system.folder().secrets.nats_viewer,
        system.ports().nats
    );
    println!();
}
