//! A system of two versions: two replicas each of orders and payments behind one gateway, replaced
//! one by one.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::ensure;
use e2e::SHORT_TIMERS;
use rustix::process::Signal;
use stack::http::Http;
use stack::ports::Ports;
use stack::process::{Process, tail};
use stack::testing::TestStack;
use stack::{NAMES, Service, System};
use tokio::time::Instant;

use crate::balancer;
use crate::old::Old;

const READY_WITHIN: Duration = Duration::from_secs(60);
const POLL_INTERVAL: Duration = Duration::from_millis(30);

/// The signal that ends a replica.
#[derive(Clone, Copy, Debug)]
pub(crate) enum StopBy {
    Sigterm,
    Sigkill,
}

/// All processes. The first replicas belong to the system; the second ones are started separately.
pub(crate) struct Upgrade {
    stack: TestStack,
    second_ports: Ports,
    second_orders: Process,
    second_payments: Process,
}

impl Upgrade {
    /// Starts everything in the old version.
    pub(crate) async fn start(old: &Old) -> anyhow::Result<Self> {
        let timers = SHORT_TIMERS
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .to_vec();
        let mut stack = TestStack::prepare_in(&old.binaries, timers).await?;
        let system = &mut stack.system;
        system.configure_nats(old.nats_configuration.clone());
        let second_ports = Ports::free()?;
        let ports = *system.ports();
        let orders = balancer::open([ports.orders, second_ports.orders]).await?;
        let payments = balancer::open([ports.payments, second_ports.payments]).await?;
        system.redirect("gateway", "orders", orders);
        system.redirect("gateway", "payments", payments);
        system.start_all(|_, _| {}).await?;
        let second_orders = start_second(system, Service::Orders, &second_ports).await?;
        let second_payments = start_second(system, Service::Payments, &second_ports).await?;
        Ok(Self {
            stack,
            second_ports,
            second_orders,
            second_payments,
        })
    }

    pub(crate) fn system(&self) -> &System {
        &self.stack.system
    }

    /// Copies the logs to a folder, before they are deleted with the stack.
    pub(crate) fn keep_logs(&self, folder: &Path) -> anyhow::Result<PathBuf> {
        std::fs::create_dir_all(folder)?;
        for entry in std::fs::read_dir(self.system().folder().path().join("logs"))? {
            let entry = entry?;
            std::fs::copy(entry.path(), folder.join(entry.file_name()))?;
        }
        Ok(folder.canonicalize()?)
    }

    /// From now on, starts the version in this folder.
    pub(crate) fn install(&mut self, binaries: PathBuf) {
        self.stack.system.install(binaries);
    }

    /// Restarts the broker with another configuration. Its data is kept.
    pub(crate) async fn restart_nats(&mut self, configuration: PathBuf) -> anyhow::Result<()> {
        let system = &mut self.stack.system;
        system.stop("nats").await?;
        system.configure_nats(configuration);
        system.start("nats").await
    }

    /// Replaces a part of the system: a first replica, or the gateway.
    pub(crate) async fn replace(&mut self, name: &str, stop_by: StopBy) -> anyhow::Result<()> {
        let system = &mut self.stack.system;
        match stop_by {
            StopBy::Sigterm => system.stop(name).await?,
            StopBy::Sigkill => system.kill(name).await?,
        }
        system.start(name).await
    }

    /// Kills the first payments and freezes the second one, which holds unacknowledged messages.
    pub(crate) async fn interrupt_payments(&mut self) -> anyhow::Result<()> {
        self.second_payments.signal(Signal::STOP)?;
        self.stack.system.kill("payments").await
    }

    /// Starts the first payments and resumes the second one.
    pub(crate) async fn resume_payments(&mut self) -> anyhow::Result<()> {
        self.stack.system.start("payments").await?;
        self.second_payments.signal(Signal::CONT)
    }

    /// Replaces the second replica of a service.
    pub(crate) async fn replace_second(
        &mut self,
        service: Service,
        stop_by: StopBy,
    ) -> anyhow::Result<()> {
        let process = match service {
            Service::Orders => &mut self.second_orders,
            _ => &mut self.second_payments,
        };
        match stop_by {
            StopBy::Sigterm => stop(process).await?,
            StopBy::Sigkill => process.kill().await?,
        }
        *process = start_second(&self.stack.system, service, &self.second_ports).await?;
        Ok(())
    }

    /// Fails if a process has exited unexpectedly.
    pub(crate) fn ensure_all_run(&mut self) -> anyhow::Result<()> {
        for name in NAMES {
            let ended = self.stack.system.ended(name);
            ensure!(ended.is_none(), "{name} exited unexpectedly: {ended:?}");
        }
        for (name, process) in [
            ("the second orders", &mut self.second_orders),
            ("the second payments", &mut self.second_payments),
        ] {
            let ended = process.ended();
            ensure!(ended.is_none(), "{name} exited unexpectedly: {ended:?}");
        }
        Ok(())
    }
}

/// Sends SIGTERM and waits for the exit.
async fn stop(process: &mut Process) -> anyhow::Result<()> {
    process.signal(Signal::TERM)?;
    let deadline = Instant::now() + READY_WITHIN;
    while process.ended().is_none() {
        ensure!(
            Instant::now() < deadline,
            "a replica did not stop within {READY_WITHIN:?}"
        );
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    Ok(())
}

async fn start_second(system: &System, service: Service, ports: &Ports) -> anyhow::Result<Process> {
    let program = system.replica(service, ports);
    let mut process = Process::start(&program)?;
    let port = match service {
        Service::Orders => ports.orders,
        _ => ports.payments,
    };
    let http = Http::new(format!("http://127.0.0.1:{port}"));
    let deadline = Instant::now() + READY_WITHIN;
    while !http
        .get("/readyz")
        .await
        .is_ok_and(|answer| answer.status == 200)
    {
        let why = || {
            format!(
                "the second {} is not ready. The end of its log:\n{}",
                service.name(),
                tail(&program.log, 15)
            )
        };
        ensure!(process.ended().is_none(), why());
        ensure!(Instant::now() < deadline, why());
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    Ok(process)
}
