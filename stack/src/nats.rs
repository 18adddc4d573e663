//! A nats-server with the shipped configuration.

use std::path::PathBuf;

use rustix::process::Signal;

use crate::folder::Secrets;
use crate::http::Http;
use crate::process::Program;
use crate::tools::Tools;

const CONFIGURATION: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../nats/single.conf");
const CLUSTER_CONFIGURATION: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../nats/cluster.conf");

/// A server: its files, ports and passwords.
#[derive(Clone, Debug)]
pub struct Nats {
    pub executable: PathBuf,
    pub data: PathBuf,
    pub log: PathBuf,
    /// On 127.0.0.1.
    pub port: u16,
    pub monitor_port: u16,
    pub secrets: Secrets,
    /// The configuration file. It includes `users.conf` from the same folder.
    pub configuration: PathBuf,
    member: Option<Member>,
}

#[derive(Clone, Debug)]
struct Member {
    name: String,
    port: u16,
    all: [u16; 3],
}

impl Nats {
    /// A server without a cluster.
    pub fn new(
        tools: &Tools,
        data: PathBuf,
        log: PathBuf,
        port: u16,
        monitor_port: u16,
        secrets: Secrets,
    ) -> Self {
        Self {
            executable: tools.nats_server.clone(),
            data,
            log,
            port,
            monitor_port,
            secrets,
            configuration: CONFIGURATION.into(),
            member: None,
        }
    }

    /// Makes it one server of a cluster of three. `port` is its port for the other servers, and
    /// `all` lists this port of each server.
    #[must_use]
    pub fn in_cluster(mut self, name: String, port: u16, all: [u16; 3]) -> Self {
        self.member = Some(Member { name, port, all });
        self.configuration = CLUSTER_CONFIGURATION.into();
        self
    }

    pub fn program(&self) -> Program {
        let secrets = &self.secrets;
        let mut environment = vec![
            ("NATS_STORE_DIR", self.data.display().to_string()),
            ("NATS_SYS_PASSWORD", secrets.nats_sys.clone()),
            ("NATS_ORDERS_PASSWORD", secrets.nats_orders.clone()),
            ("NATS_PAYMENTS_PASSWORD", secrets.nats_payments.clone()),
            ("NATS_GATEWAY_PASSWORD", secrets.nats_gateway.clone()),
            ("NATS_OPS_PASSWORD", secrets.nats_ops.clone()),
            ("NATS_VIEWER_PASSWORD", secrets.nats_viewer.clone()),
            ("NATS_READER_PASSWORD", secrets.nats_reader.clone()),
        ];
        let port = self.port.to_string();
        let monitor_port = self.monitor_port.to_string();
        let configuration = self.configuration.display().to_string();
        let mut arguments: Vec<String> = [
            "--config",
            &configuration,
            "--addr",
            "127.0.0.1",
            "--port",
            &port,
            "--http_port",
            &monitor_port,
        ]
        .map(str::to_owned)
        .to_vec();
        if let Some(member) = &self.member {
            environment.push(("NATS_SERVER_NAME", member.name.clone()));
            environment.push(("NATS_CLUSTER_PASSWORD", secrets.nats_sys.clone()));
            for (name, port) in ["NATS_ROUTE_1", "NATS_ROUTE_2", "NATS_ROUTE_3"]
                .into_iter()
                .zip(member.all)
            {
                environment.push((
                    name,
                    format!("nats://route:{}@127.0.0.1:{port}", secrets.nats_sys),
                ));
            }
            arguments.extend([
                "--cluster".to_owned(),
                format!("nats://127.0.0.1:{}", member.port),
            ]);
        }
        Program {
            name: "nats".to_owned(),
            executable: self.executable.clone(),
            arguments,
            environment: environment
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value))
                .collect(),
            log: self.log.clone(),
            stop_signal: Signal::TERM,
            unprivileged: false,
        }
    }

    /// Whether JetStream is ready.
    pub async fn is_ready(&self) -> bool {
        let monitor = Http::new(format!("http://127.0.0.1:{}", self.monitor_port));
        monitor
            .get("/healthz?js-enabled-only=true")
            .await
            .is_ok_and(|answer| answer.status == 200)
    }

    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }
}
