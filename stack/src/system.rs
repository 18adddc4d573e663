//! The five parts of a stack, and how to start, stop, kill and pause each of them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use rustix::process::Signal;
use tokio::time::Instant;

use crate::folder::StackFolder;
use crate::http::Http;
use crate::nats::Nats;
use crate::ports::Ports;
use crate::postgres::Postgres;
use crate::process::{Process, Program, tail};
use crate::tools::Tools;

/// The parts in start order. Any order works; this one is the fastest.
pub const NAMES: [&str; 5] = ["postgres", "nats", "orders", "payments", "gateway"];

const READY_TIMEOUT: Duration = Duration::from_secs(60);
const READY_INTERVAL: Duration = Duration::from_millis(30);
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

/// One of our own programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    Orders,
    Payments,
    Gateway,
}

impl Service {
    /// The name of the part and of its program.
    pub fn name(self) -> &'static str {
        match self {
            Self::Orders => "orders",
            Self::Payments => "payments",
            Self::Gateway => "gateway",
        }
    }
}

#[derive(Clone, Debug)]
pub struct Options {
    pub ports: Ports,
    /// The folder with our own programs.
    pub binaries: PathBuf,
    /// Additional environment variables of our own programs, for example failpoints.
    pub environment: Vec<(String, String)>,
}

#[derive(Debug)]
pub struct System {
    folder: StackFolder,
    ports: Ports,
    postgres: PostgresPart,
    nats: Nats,
    binaries: PathBuf,
    environment: Vec<(String, String)>,
    /// Ports at which a service connects to a part, if not the part's own. By service and part.
    redirects: BTreeMap<(&'static str, &'static str), u16>,
    processes: BTreeMap<&'static str, Process>,
}

struct PostgresPart(Postgres);

impl std::fmt::Debug for PostgresPart {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PostgreSQL on port {}", self.0.port)
    }
}

impl System {
    /// Creates the data folders. Starts nothing.
    pub async fn prepare(
        tools: &Tools,
        folder: StackFolder,
        options: Options,
    ) -> anyhow::Result<Self> {
        let Options {
            ports,
            binaries,
            environment,
        } = options;
        for service in [Service::Orders, Service::Payments, Service::Gateway] {
            let program = binaries.join(service.name());
            ensure!(
                program.exists(),
                "{} is not built: run ./dev build",
                program.display()
            );
        }
        let secrets = folder.secrets.clone();
        let password = secrets.postgres_superuser.clone();
        let postgres = Postgres::new(
            tools,
            folder.postgres_data(),
            folder.log("postgres"),
            ports.postgres,
            password,
        )?;
        postgres.initialize().await?;
        let nats = Nats::new(
            tools,
            folder.nats_data(),
            folder.log("nats"),
            ports.nats,
            ports.nats_monitor,
            secrets,
        );
        fs::create_dir_all(&nats.data)?;
        Ok(Self {
            folder,
            ports,
            postgres: PostgresPart(postgres),
            nats,
            binaries,
            environment,
            redirects: BTreeMap::new(),
            processes: BTreeMap::new(),
        })
    }

    pub fn folder(&self) -> &StackFolder {
        &self.folder
    }

    pub fn ports(&self) -> &Ports {
        &self.ports
    }

    pub fn postgres(&self) -> &Postgres {
        &self.postgres.0
    }

    pub fn nats(&self) -> &Nats {
        &self.nats
    }

    pub fn port(&self, name: &str) -> anyhow::Result<u16> {
        Ok(match known(name)? {
            "postgres" => self.ports.postgres,
            "nats" => self.ports.nats,
            "orders" => self.ports.orders,
            "payments" => self.ports.payments,
            _ => self.ports.gateway,
        })
    }

    /// From their next start on, services run the programs in this folder.
    pub fn install(&mut self, binaries: PathBuf) {
        self.binaries = binaries;
    }

    /// From its next start on, the broker uses this configuration file.
    pub fn configure_nats(&mut self, configuration: PathBuf) {
        self.nats.configuration = configuration;
    }

    /// From its next start on, `service` connects to `part` at this port.
    pub fn redirect(&mut self, service: &'static str, part: &'static str, port: u16) {
        self.redirects.insert((service, part), port);
    }

    /// Starts a part and waits until it is ready.
    pub async fn start(&mut self, name: &str) -> anyhow::Result<()> {
        self.spawn(name)?;
        self.until_ready(name).await
    }

    pub fn spawn(&mut self, name: &str) -> anyhow::Result<()> {
        self.spawn_with(name, &[])
    }

    /// Starts a part with additional environment variables, for this run only.
    pub fn spawn_with(&mut self, name: &str, environment: &[(&str, &str)]) -> anyhow::Result<()> {
        let name = known(name)?;
        ensure!(
            self.processes
                .get_mut(name)
                .is_none_or(|process| process.ended().is_some()),
            "{name} already runs"
        );
        let mut program = self.program(name);
        program.environment.extend(
            environment
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned())),
        );
        self.processes.insert(name, Process::start(&program)?);
        Ok(())
    }

    /// Waits until a started part is ready. If it exits, the error contains the end of its log.
    pub async fn until_ready(&mut self, name: &str) -> anyhow::Result<()> {
        let name = known(name)?;
        let deadline = Instant::now() + READY_TIMEOUT;
        loop {
            let log = self.folder.log(name);
            let ended = self
                .processes
                .get_mut(name)
                .with_context(|| format!("{name} was not started"))?
                .ended();
            if let Some(status) = ended {
                bail!(
                    "{name} ended before it was ready ({status}). The end of {}:\n{}",
                    log.display(),
                    tail(&log, 15)
                );
            }
            if self.is_ready(name).await {
                break;
            }
            if Instant::now() > deadline {
                bail!(
                    "{name} is not ready after {READY_TIMEOUT:?}. The end of {}:\n{}",
                    log.display(),
                    tail(&log, 15)
                );
            }
            tokio::time::sleep(READY_INTERVAL).await;
        }
        if name == "postgres" {
            let secrets = &self.folder.secrets;
            self.postgres()
                .ensure_database("orders", &secrets.postgres_orders)
                .await?;
            self.postgres()
                .ensure_database("payments", &secrets.postgres_payments)
                .await?;
            self.postgres().close_superuser_database().await?;
        }
        Ok(())
    }

    /// Whether a part passes its readiness check now.
    pub async fn is_ready(&self, name: &str) -> bool {
        let probe = async {
            match name {
                "postgres" => self.postgres().is_ready().await,
                "nats" => self.nats.is_ready().await,
                _ => Http::new(self.address(name))
                    .get("/readyz")
                    .await
                    .is_ok_and(|answer| answer.status == 200),
            }
        };
        tokio::time::timeout(PROBE_TIMEOUT, probe)
            .await
            .unwrap_or(false)
    }

    /// Sends the stop signal and waits until the part has exited.
    pub async fn stop(&mut self, name: &str) -> anyhow::Result<()> {
        match self.processes.remove(known(name)?) {
            Some(process) => process.stop().await,
            None => Ok(()),
        }
    }

    /// Sends SIGKILL.
    pub async fn kill(&mut self, name: &str) -> anyhow::Result<()> {
        match self.processes.remove(known(name)?) {
            Some(mut process) => process.kill().await,
            None => Ok(()),
        }
    }

    /// Immediate shutdown of PostgreSQL: ends all sessions without a checkpoint. The next start
    /// runs crash recovery.
    pub async fn stop_postgres_immediately(&mut self) -> anyhow::Result<()> {
        match self.processes.remove("postgres") {
            Some(process) => process.stop_by(Signal::QUIT).await,
            None => Ok(()),
        }
    }

    /// Pauses a part (SIGSTOP).
    pub fn pause(&self, name: &str) -> anyhow::Result<()> {
        self.running(name)?.signal(Signal::STOP)
    }

    /// Resumes a paused part (SIGCONT).
    pub fn resume(&self, name: &str) -> anyhow::Result<()> {
        self.running(name)?.signal(Signal::CONT)
    }

    /// Starts all parts. Calls `progress` each time one is ready.
    pub async fn start_all(
        &mut self,
        mut progress: impl FnMut(&str, Duration),
    ) -> anyhow::Result<()> {
        for name in NAMES {
            let begun = Instant::now();
            self.start(name).await?;
            progress(name, begun.elapsed());
        }
        Ok(())
    }

    /// Stops all parts, the gateway first.
    pub async fn stop_all(&mut self) -> anyhow::Result<()> {
        let mut result = Ok(());
        for name in NAMES.into_iter().rev() {
            let stopped = self.stop(name).await;
            result = result.and(stopped);
        }
        result
    }

    /// Deletes all data of the broker, which must not run.
    pub fn wipe_nats(&mut self) -> anyhow::Result<()> {
        ensure!(
            self.processes
                .get_mut("nats")
                .is_none_or(|process| process.ended().is_some()),
            "stop nats before wiping its data"
        );
        fs::remove_dir_all(&self.nats.data)?;
        fs::create_dir_all(&self.nats.data)?;
        Ok(())
    }

    /// Copies all data of the broker, which must not run. Replaces an earlier copy.
    pub fn copy_nats(&mut self) -> anyhow::Result<()> {
        ensure!(
            self.pid("nats").is_none(),
            "stop nats before copying its data"
        );
        let copy = self.nats_copy();
        if copy.exists() {
            fs::remove_dir_all(&copy)?;
        }
        copy_folder(&self.nats.data, &copy)
    }

    /// Restores the copy made by [`Self::copy_nats`]. The broker must not run.
    pub fn roll_back_nats(&mut self) -> anyhow::Result<()> {
        self.wipe_nats()?;
        copy_folder(&self.nats_copy(), &self.nats.data)
    }

    fn nats_copy(&self) -> PathBuf {
        self.nats.data.with_extension("copy")
    }

    /// The process id of a part; `None` if it does not run.
    pub fn pid(&mut self, name: &str) -> Option<u32> {
        let process = self.processes.get_mut(known(name).ok()?)?;
        if process.ended().is_some() {
            None
        } else {
            Some(process.pid())
        }
    }

    /// Whether a part is paused, by us or by a failpoint in it (SIGSTOP).
    pub fn is_paused(&mut self, name: &str) -> bool {
        let Some(pid) = self.pid(name) else {
            return false;
        };
        // The state is the field after the program's name in parentheses.
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(") ")
            .is_some_and(|(_, rest)| rest.starts_with('T'))
    }

    /// The exit status of a part that was started and has exited.
    pub fn ended(&mut self, name: &str) -> Option<std::process::ExitStatus> {
        self.processes.get_mut(known(name).ok()?)?.ended()
    }

    /// The URL of a part.
    pub fn address(&self, name: &str) -> String {
        address(&self.ports, name)
    }

    fn running(&self, name: &str) -> anyhow::Result<&Process> {
        self.processes
            .get(known(name)?)
            .with_context(|| format!("{name} does not run"))
    }

    fn program(&self, name: &'static str) -> Program {
        match name {
            "postgres" => self.postgres().program(),
            "nats" => self.nats.program(),
            _ => Program {
                name: name.to_owned(),
                executable: self.binaries.join(name),
                arguments: Vec::new(),
                environment: self.service_environment(name, &self.ports),
                log: self.folder.log(name),
                stop_signal: Signal::TERM,
                unprivileged: false,
            },
        }
    }

    /// A second process of a service on other ports, with the same databases and broker. A gateway
    /// forwards to the services on `ports`.
    pub fn replica(&self, service: Service, ports: &Ports) -> Program {
        let name = service.name();
        let log = self.folder.log(&format!("{name}-{}", ports.gateway));
        Program {
            environment: self.service_environment(name, ports),
            log,
            ..self.program(name)
        }
    }

    fn service_environment(&self, name: &'static str, ports: &Ports) -> Vec<(String, String)> {
        let secrets = &self.folder.secrets;
        let local = |port: u16| format!("127.0.0.1:{port}");
        let port = |part: &'static str, own: u16| {
            self.redirects.get(&(name, part)).copied().unwrap_or(own)
        };
        let postgres = Postgres {
            port: port("postgres", self.ports.postgres),
            ..self.postgres().clone()
        };
        let nats = format!("nats://{}", local(port("nats", self.ports.nats)));
        let mut environment: Vec<(&str, String)> = match name {
            "orders" => vec![
                ("GOZON_LISTEN", local(ports.orders)),
                (
                    "DATABASE_URL",
                    postgres.url("orders", &secrets.postgres_orders, "orders"),
                ),
                ("NATS_URL", nats),
                ("NATS_PASSWORD", secrets.nats_orders.clone()),
            ],
            "payments" => vec![
                ("GOZON_LISTEN", local(ports.payments)),
                (
                    "DATABASE_URL",
                    postgres.url("payments", &secrets.postgres_payments, "payments"),
                ),
                ("NATS_URL", nats),
                ("NATS_PASSWORD", secrets.nats_payments.clone()),
            ],
            _ => vec![
                ("GOZON_LISTEN", local(ports.gateway)),
                (
                    "GOZON_ORDERS_URL",
                    format!("http://{}", local(port("orders", ports.orders))),
                ),
                (
                    "GOZON_PAYMENTS_URL",
                    format!("http://{}", local(port("payments", ports.payments))),
                ),
                ("NATS_URL", nats),
                ("NATS_PASSWORD", secrets.nats_gateway.clone()),
            ],
        };
        environment.extend(
            self.environment
                .iter()
                .map(|(name, value)| (name.as_str(), value.clone())),
        );
        environment
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect()
    }
}

fn copy_folder(from: &Path, to: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_folder(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

pub(crate) fn address(ports: &Ports, name: &str) -> String {
    match name {
        "postgres" => format!("postgres://127.0.0.1:{}", ports.postgres),
        "nats" => format!("nats://127.0.0.1:{}", ports.nats),
        "orders" => format!("http://127.0.0.1:{}", ports.orders),
        "payments" => format!("http://127.0.0.1:{}", ports.payments),
        _ => format!("http://127.0.0.1:{}", ports.gateway),
    }
}

pub(crate) fn known(name: &str) -> anyhow::Result<&'static str> {
    NAMES
        .into_iter()
        .find(|known| *known == name)
        .with_context(|| {
            format!(
                "there is no part {name:?}; the parts are {}",
                NAMES.join(", ")
            )
        })
}
