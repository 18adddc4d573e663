//! A NATS cluster for tests.

use std::fs;

use anyhow::Context as _;
use rustix::process::Signal;
use tokio::time::Instant;

use super::{POLL_INTERVAL, READY_TIMEOUT, TemporaryFolder};
use crate::folder::Secrets;
use crate::http::Http;
use crate::nats::Nats;
use crate::ports::free_port;
use crate::process::{Process, tail};
use crate::tools::Tools;

/// A cluster of three servers with the shipped configuration and users.
#[derive(Debug)]
pub struct TestCluster {
    servers: Vec<(Nats, Option<Process>)>,
    _folder: TemporaryFolder,
}

impl TestCluster {
    /// Prepares three servers with these passwords and ports. Starts nothing.
    pub fn prepare(secrets: &Secrets, ports: [u16; 3]) -> anyhow::Result<Self> {
        let folder = TemporaryFolder::new()?;
        let tools = Tools::find()?;
        let cluster_ports = [free_port()?, free_port()?, free_port()?];
        let mut servers = Vec::new();
        for (number, port) in ports.into_iter().enumerate() {
            let data = folder.path().join(format!("nats-{number}"));
            fs::create_dir(&data)?;
            let log = folder.path().join(format!("nats-{number}.log"));
            let nats = Nats::new(&tools, data, log, port, free_port()?, secrets.clone());
            servers.push((
                nats.in_cluster(
                    format!("gozon-{number}"),
                    cluster_ports[number],
                    cluster_ports,
                ),
                None,
            ));
        }
        Ok(Self {
            servers,
            _folder: folder,
        })
    }

    pub fn url(&self, number: usize) -> String {
        self.servers[number].0.url()
    }

    pub fn spawn(&mut self, number: usize) -> anyhow::Result<()> {
        let (nats, process) = &mut self.servers[number];
        *process = Some(Process::start(&nats.program())?);
        Ok(())
    }

    /// Sends SIGKILL.
    pub async fn kill(&mut self, number: usize) -> anyhow::Result<()> {
        match self.servers[number].1.take() {
            Some(mut process) => process.kill().await,
            None => Ok(()),
        }
    }

    /// Freezes a server (SIGSTOP). The others cannot reach it.
    pub fn pause(&self, number: usize) -> anyhow::Result<()> {
        self.signal(number, Signal::STOP)
    }

    /// Resumes a frozen server (SIGCONT).
    pub fn resume(&self, number: usize) -> anyhow::Result<()> {
        self.signal(number, Signal::CONT)
    }

    fn signal(&self, number: usize, signal: Signal) -> anyhow::Result<()> {
        self.servers[number]
            .1
            .as_ref()
            .context("the server does not run")?
            .signal(signal)
    }

    /// Waits until all running servers are ready.
    pub async fn until_ready(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + READY_TIMEOUT;
        for (nats, _) in self.servers.iter().filter(|(_, process)| process.is_some()) {
            while !nats.is_ready().await {
                anyhow::ensure!(
                    Instant::now() < deadline,
                    "the cluster is not ready. The end of {}:\n{}",
                    nats.log.display(),
                    tail(&nats.log, 15)
                );
                tokio::time::sleep(POLL_INTERVAL).await;
            }
        }
        Ok(())
    }

    /// The server that is the leader of a stream, if there is one.
    pub async fn leader(&self, stream: &str) -> Option<usize> {
        self.leader_among(stream, &[0, 1, 2]).await
    }

    /// Like [`Self::leader`], but asks only these servers, because a frozen server does not answer.
    pub async fn leader_among(&self, stream: &str, numbers: &[usize]) -> Option<usize> {
        for &number in numbers {
            let (nats, process) = &self.servers[number];
            if process.is_none() {
                continue;
            }
            let monitor = Http::new(format!("http://127.0.0.1:{}", nats.monitor_port));
            let Ok(answer) = monitor.get("/jsz?streams=true").await else {
                continue;
            };
            let answer = answer.json();
            let accounts = answer["account_details"].as_array().into_iter().flatten();
            let mut streams = accounts
                .flat_map(|account| account["stream_detail"].as_array().into_iter().flatten());
            let found = streams.find(|found| found["name"] == stream);
            if found.is_some_and(|found| found["cluster"]["leader"] == format!("gozon-{number}")) {
                return Some(number);
            }
        }
        None
    }
}
