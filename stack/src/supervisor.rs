//! Keeps a stack running: restarts a part one second after it died, like a container engine. Serves
//! the requests of [`crate::control`].

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::time::Duration;

use anyhow::{Context as _, bail};
use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::net::UnixStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::Instant;

use crate::control::{self, Request};
use crate::folder::StackFolder;
use crate::ports::Ports;
use crate::system::{NAMES, Options, System, address, known};
use crate::tools::Tools;

const RESTART_DELAY: Duration = Duration::from_secs(1);
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// The state of one part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartStatus {
    /// `postgres`, `nats`, `orders`, `payments` or `gateway`.
    pub name: String,
    pub pid: Option<u32>,
    pub address: String,
    pub log: String,
    /// The data folder of PostgreSQL or NATS.
    pub data: Option<String>,
    /// Whether it passes its readiness check.
    pub ready: bool,
}

impl PartStatus {
    /// The state of all parts if nothing runs.
    pub fn all_stopped(folder: &std::path::Path, ports: &Ports) -> Vec<Self> {
        let part = |name: &str| Self {
            name: name.to_owned(),
            pid: None,
            address: address(ports, name),
            log: folder
                .join("logs")
                .join(format!("{name}.log"))
                .display()
                .to_string(),
            data: matches!(name, "postgres" | "nats")
                .then(|| folder.join(name).display().to_string()),
            ready: false,
        };
        NAMES.into_iter().map(part).collect()
    }
}

struct Supervisor {
    system: System,
    /// These parts are not restarted.
    stopped_by_request: BTreeSet<&'static str>,
    /// When to restart each part that died.
    due: BTreeMap<&'static str, Instant>,
}

/// Starts a stack and keeps it running until Ctrl-C, SIGTERM or `down`. If the start fails, stops
/// everything. Calls `ready` once, when all parts are ready.
pub async fn supervise(
    tools: &Tools,
    folder: StackFolder,
    options: Options,
    ready: impl FnOnce(&System),
) -> anyhow::Result<()> {
    let path = folder.path().to_owned();
    let lock = File::create(path.join("lock"))?;
    if lock.try_lock().is_err() {
        bail!(
            "a stack already runs in {}: ./dev status shows it, ./dev down stops it",
            path.display()
        );
    }
    options.ports.ensure_free()?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut system = System::prepare(tools, folder, options).await?;

    let begun = Instant::now();
    let progress = |name: &str, took: Duration| {
        println!("  {name:<9} ready after {:.1} s", took.as_secs_f32())
    };
    let started = tokio::select! {
        started = system.start_all(progress) => started,
        _ = interrupt.recv() => Err(anyhow::anyhow!("stopped before everything was ready")),
        _ = terminate.recv() => Err(anyhow::anyhow!("stopped before everything was ready")),
    };
    if let Err(error) = started {
        system.stop_all().await?;
        return Err(error);
    }
    println!("  all ready after {:.1} s", begun.elapsed().as_secs_f32());
    ready(&system);

    let listener = control::listen(&path)?;
    let mut supervisor = Supervisor {
        system,
        stopped_by_request: BTreeSet::new(),
        due: BTreeMap::new(),
    };
    let requester = loop {
        tokio::select! {
            _ = interrupt.recv() => break None,
            _ = terminate.recv() => break None,
            () = tokio::time::sleep(POLL_INTERVAL) => supervisor.restart_dead_parts(),
            connection = listener.accept() => match supervisor.serve(connection?.0).await {
                Served::Continue => {}
                Served::Down(stream) => break Some(stream),
            },
        }
    };
    println!("Stopping.");
    let stopped = supervisor.system.stop_all().await;
    control::close(&path);
    if let Some(stream) = requester {
        control::reply(
            stream,
            stopped
                .as_ref()
                .map(|()| Value::Null)
                .map_err(|error| anyhow::anyhow!("{error:#}")),
        )
        .await?;
    }
    stopped
}

enum Served {
    Continue,
    Down(UnixStream),
}

impl Supervisor {
    /// Notices parts that died, and restarts each after [`RESTART_DELAY`].
    fn restart_dead_parts(&mut self) {
        for name in NAMES {
            if self.stopped_by_request.contains(name) {
                continue;
            }
            let Some(status) = self.system.ended(name) else {
                self.due.remove(name);
                continue;
            };
            let due = *self.due.entry(name).or_insert_with(|| {
                println!(
                    "{name} ended ({status}); restarting it in {} s",
                    RESTART_DELAY.as_secs()
                );
                Instant::now() + RESTART_DELAY
            });
            if Instant::now() >= due {
                self.due.remove(name);
                if let Err(error) = self.system.spawn(name) {
                    println!("{name} cannot be started: {error:#}");
                }
            }
        }
    }

    async fn serve(&mut self, stream: UnixStream) -> Served {
        let (request, stream) = match control::read(stream).await {
            Ok(read) => read,
            Err(error) => {
                println!("Invalid request: {error:#}");
                return Served::Continue;
            }
        };
        let answer = match &request {
            Request::Down => return Served::Down(stream),
            Request::Status => self.status().await,
            Request::Start { name } => self.start(name).await,
            Request::Stop { name } => self.stop(name).await,
        };
        if let Err(error) = control::reply(stream, answer).await {
            println!("A request could not be answered: {error:#}");
        }
        Served::Continue
    }

    async fn status(&mut self) -> anyhow::Result<Value> {
        let mut parts = PartStatus::all_stopped(self.system.folder().path(), self.system.ports());
        let ready = join_all(NAMES.map(|name| self.system.is_ready(name))).await;
        for (part, ready) in parts.iter_mut().zip(ready) {
            part.pid = self.system.pid(&part.name);
            part.ready = ready && part.pid.is_some();
        }
        serde_json::to_value(parts).context("a status is plain data")
    }

    async fn start(&mut self, name: &str) -> anyhow::Result<Value> {
        let name = known(name)?;
        self.stopped_by_request.remove(name);
        self.due.remove(name);
        if self.system.pid(name).is_none() {
            self.system.spawn(name)?;
            println!("{name} was started on request");
        }
        self.system.until_ready(name).await?;
        Ok(Value::Null)
    }

    async fn stop(&mut self, name: &str) -> anyhow::Result<Value> {
        let name = known(name)?;
        self.stopped_by_request.insert(name);
        self.due.remove(name);
        self.system.stop(name).await?;
        println!("{name} was stopped on request");
        Ok(Value::Null)
    }
}
