//! For tests: one database server for the whole run, a new database and a new broker for each test,
//! and waiting for a condition instead of sleeping.

mod cluster;
mod disk;
mod held;

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context as _;
use rustix::process::Signal;
use sea_orm::DatabaseConnection;
use tokio::sync::{OnceCell, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::folder::{Secrets, StackFolder};
use crate::http::Http;
use crate::nats::Nats;
use crate::ports::{Ports, free_port};
use crate::postgres::Postgres;
use crate::process::{Process, Program, tail};
use crate::proxies::Proxies;
use crate::seed::Seed;
use crate::system::{Options, System};
use crate::tools::Tools;

pub use self::cluster::TestCluster;
pub use self::disk::SmallDisk;
pub use self::held::HeldInserts;

const READY_TIMEOUT: Duration = Duration::from_secs(60);
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Waits until `check` returns a value. Panics with `what` after `within`.
pub async fn eventually<T>(
    what: &str,
    within: Duration,
    mut check: impl AsyncFnMut() -> Option<T>,
) -> T {
    let deadline = Instant::now() + within;
    loop {
        if let Some(value) = check().await {
            return value;
        }
        assert!(Instant::now() < deadline, "not within {within:?}: {what}");
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// A folder that is deleted after the test. It is in the system's temporary folder, because every
/// user can enter that one.
#[derive(Debug)]
pub struct TemporaryFolder(PathBuf);

impl TemporaryFolder {
    /// Creates a folder. The first call also deletes the folders that killed test runs have left.
    pub fn new() -> anyhow::Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        if number == 0 {
            remove_leftovers();
        }
        let folder =
            std::env::temp_dir().join(format!("gozon-test-{}-{number}", std::process::id()));
        fs::create_dir(&folder)
            .with_context(|| format!("{} cannot be created", folder.display()))?;
        Ok(Self(folder))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TemporaryFolder {
    fn drop(&mut self) {
        // If this fails, a later run deletes it.
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn remove_leftovers() {
    for entry in fs::read_dir(std::env::temp_dir())
        .into_iter()
        .flatten()
        .flatten()
    {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(pid) = name
            .strip_prefix("gozon-test-")
            .and_then(|rest| rest.split('-').next()?.parse::<u32>().ok())
        else {
            continue;
        };
        if !Path::new(&format!("/proc/{pid}")).exists() {
            // Another run may be deleting it too.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// A service inside the test process. It has its own thread and runtime, so that a test can crash
/// it like a process.
#[derive(Debug)]
pub struct InProcessService {
    pub address: SocketAddr,
    shutdown: CancellationToken,
    crash: CancellationToken,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
}

impl InProcessService {
    /// Runs `service`. It must send its address as soon as it listens, and end when the token is
    /// cancelled.
    pub async fn start<F>(
        service: impl FnOnce(oneshot::Sender<SocketAddr>, CancellationToken) -> F + Send + 'static,
    ) -> anyhow::Result<Self>
    where
        F: Future<Output = anyhow::Result<()>>,
    {
        let (shutdown, crash) = (CancellationToken::new(), CancellationToken::new());
        let (stop, crashed) = (shutdown.clone(), crash.clone());
        let (sender, listening) = oneshot::channel();
        let thread = std::thread::Builder::new()
            .name("service".to_owned())
            .spawn(move || {
                let runtime = tokio::runtime::Builder::new_multi_thread()
                    .worker_threads(1)
                    .enable_all()
                    .build()?;
                let ended = runtime.block_on(async {
                    tokio::select! {
                        ended = service(sender, stop) => ended,
                        () = crashed.cancelled() => Ok(()),
                    }
                });
                runtime.shutdown_background();
                ended
            })?;
        let address = listening
            .await
            .context("the service ended before it listened")?;
        Ok(Self {
            address,
            shutdown,
            crash,
            thread: Some(thread),
        })
    }

    /// Stops it gracefully and returns its result.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        self.shutdown.cancel();
        self.join().await
    }

    /// Drops the service wherever it is. It cannot finish or report anything.
    pub async fn crash(mut self) -> anyhow::Result<()> {
        self.crash.cancel();
        self.join().await
    }

    async fn join(&mut self) -> anyhow::Result<()> {
        let thread = self
            .thread
            .take()
            .context("the service is already stopped")?;
        tokio::task::spawn_blocking(move || {
            thread
                .join()
                .unwrap_or_else(|_| Err(anyhow::anyhow!("the service panicked")))
        })
        .await?
    }
}

impl Drop for InProcessService {
    fn drop(&mut self) {
        self.crash.cancel();
    }
}

/// The database of one test.
#[derive(Clone)]
pub struct TestDatabase {
    /// The connection URL, as the database's owner.
    pub url: String,
    name: String,
    server: Postgres,
}

impl TestDatabase {
    /// Creates an empty database on the server that all tests of this process share.
    pub async fn fresh() -> anyhow::Result<Self> {
        static SERVER: OnceCell<Postgres> = OnceCell::const_new();
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let server = SERVER.get_or_try_init(shared_postgres).await?.clone();
        let name = format!("test_{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        server.ensure_database(&name, "password").await?;
        Ok(Self {
            url: server.url(&name, "password", &name),
            name,
            server,
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn port(&self) -> u16 {
        self.server.port
    }

    /// The connection URL of its owner, with another port of this machine.
    pub fn url_at(&self, port: u16) -> String {
        let (server, proxy) = (format!(":{}/", self.port()), format!(":{port}/"));
        self.url.replace(&server, &proxy)
    }

    /// Connects as superuser, to read or corrupt data.
    pub async fn connect(&self) -> anyhow::Result<DatabaseConnection> {
        self.server.connect(&self.name).await
    }

    /// Connects as superuser to another database of the same server, for example to drop this one.
    pub async fn connect_elsewhere(&self) -> anyhow::Result<DatabaseConnection> {
        self.server.connect("postgres").await
    }
}

/// Starts the shared server, once per test process. The server ends with the thread that started
/// it, and that thread ends with the process.
async fn shared_postgres() -> anyhow::Result<Postgres> {
    let tools = Tools::find()?;
    let folder = TemporaryFolder::new()?;
    let mut server = Postgres::new(
        &tools,
        folder.path().join("data"),
        folder.path().join("log"),
        free_port()?,
        "password".to_owned(),
    )?;
    // Tests that need durability start their own server.
    server.settings = ["fsync=off", "max_connections=500", "shared_buffers=64MB"]
        .map(str::to_owned)
        .to_vec();
    server.initialize().await?;
    let program = server.program();
    let (sender, started) = mpsc::channel();
    std::thread::Builder::new()
        .name("postgres".to_owned())
        .spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            let process = runtime.map_err(anyhow::Error::from).and_then(|runtime| {
                let _entered = runtime.enter();
                let process = Process::start(&program)?;
                // Keeps the folder, and the runtime that watches the child, until this process
                // ends.
                Ok((process, runtime, folder))
            });
            let failed = process.as_ref().err().map(|error| format!("{error:#}"));
            if sender.send(failed).is_ok() && process.is_ok() {
                loop {
                    std::thread::park();
                }
            }
        })?;
    if let Some(error) = tokio::task::spawn_blocking(move || started.recv()).await?? {
        anyhow::bail!(error);
    }
    let log = server.log.clone();
    let deadline = Instant::now() + READY_TIMEOUT;
    while !server.is_ready().await {
        anyhow::ensure!(
            Instant::now() < deadline,
            "PostgreSQL for tests is not ready. The end of its log:\n{}",
            tail(&log, 15)
        );
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    Ok(server)
}

/// The broker of one test, with the shipped configuration and users.
#[derive(Debug)]
pub struct TestBroker {
    nats: Nats,
    process: Option<Process>,
    _folder: TemporaryFolder,
}

impl TestBroker {
    pub async fn start() -> anyhow::Result<Self> {
        let mut broker = Self::stopped()?;
        broker.up().await?;
        Ok(broker)
    }

    /// A broker that has an address but is not started yet.
    pub fn stopped() -> anyhow::Result<Self> {
        let folder = TemporaryFolder::new()?;
        let stack_folder = StackFolder::open(folder.path())?;
        let (data, log) = (stack_folder.nats_data(), stack_folder.log("nats"));
        fs::create_dir_all(&data)?;
        let nats = Nats::new(
            &Tools::find()?,
            data,
            log,
            free_port()?,
            free_port()?,
            stack_folder.secrets,
        );
        Ok(Self {
            nats,
            process: None,
            _folder: folder,
        })
    }

    /// Starts the broker and waits until it is ready.
    pub async fn up(&mut self) -> anyhow::Result<()> {
        self.process = Some(Process::start(&self.nats.program())?);
        let deadline = Instant::now() + READY_TIMEOUT;
        while !self.nats.is_ready().await {
            anyhow::ensure!(
                Instant::now() < deadline,
                "NATS for tests is not ready. The end of its log:\n{}",
                tail(&self.nats.log, 15)
            );
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        Ok(())
    }

    /// Sends SIGKILL.
    pub async fn kill(&mut self) -> anyhow::Result<()> {
        match self.process.take() {
            Some(mut process) => process.kill().await,
            None => Ok(()),
        }
    }

    /// Deletes all data of the broker, which must not run.
    pub fn wipe(&mut self) -> anyhow::Result<()> {
        anyhow::ensure!(self.process.is_none(), "kill the broker before wiping it");
        fs::remove_dir_all(&self.nats.data)?;
        Ok(fs::create_dir_all(&self.nats.data)?)
    }

    /// Numbers of messages of a durable consumer: not delivered yet, and delivered but not
    /// acknowledged.
    pub async fn lag(&self, consumer: &str) -> Option<(u64, u64)> {
        let monitor = Http::new(format!("http://127.0.0.1:{}", self.nats.monitor_port));
        let answer = monitor
            .get("/jsz?streams=true&consumers=true")
            .await
            .ok()?
            .json();
        let accounts = answer["account_details"].as_array()?.iter();
        let streams =
            accounts.flat_map(|account| account["stream_detail"].as_array().into_iter().flatten());
        let mut consumers =
            streams.flat_map(|stream| stream["consumer_detail"].as_array().into_iter().flatten());
        let found = consumers.find(|other| other["name"] == consumer)?;
        Some((
            found["num_pending"].as_u64()?,
            found["num_ack_pending"].as_u64()?,
        ))
    }

    pub fn url(&self) -> String {
        self.nats.url()
    }

    pub fn secrets(&self) -> &Secrets {
        &self.nats.secrets
    }
}

/// One of our own programs as built by cargo, for a test that runs more processes than a stack has.
pub fn service_program(name: &str, log: PathBuf) -> anyhow::Result<Program> {
    Ok(Program {
        name: name.to_owned(),
        executable: own_programs()?.join(name),
        arguments: Vec::new(),
        environment: Vec::new(),
        log,
        stop_signal: Signal::TERM,
        unprivileged: false,
    })
}

/// The stack of one test, with real processes.
pub struct TestStack {
    pub system: System,
    _folder: TemporaryFolder,
}

impl TestStack {
    /// Starts all parts. Our own programs are those built by cargo.
    pub async fn start() -> anyhow::Result<Self> {
        Self::start_with(Vec::new()).await
    }

    /// Like [`Self::start`], with additional environment variables for our own programs.
    pub async fn start_with(environment: Vec<(String, String)>) -> anyhow::Result<Self> {
        Self::start_in(&own_programs()?, environment).await
    }

    /// Like [`Self::start_with`], with our own programs from `binaries`.
    pub async fn start_in(
        binaries: &Path,
        environment: Vec<(String, String)>,
    ) -> anyhow::Result<Self> {
        let mut stack = Self::prepare_in(binaries, environment).await?;
        stack.system.start_all(|_, _| {}).await?;
        Ok(stack)
    }

    /// Starts nothing, so that the test can change the system before it calls `start_all`.
    pub async fn prepare(environment: Vec<(String, String)>) -> anyhow::Result<Self> {
        Self::prepare_in(&own_programs()?, environment).await
    }

    /// Like [`Self::prepare`], with our own programs from `binaries`.
    pub async fn prepare_in(
        binaries: &Path,
        environment: Vec<(String, String)>,
    ) -> anyhow::Result<Self> {
        let folder = TemporaryFolder::new()?;
        let stack_folder = StackFolder::open(folder.path())?;
        let options = Options {
            ports: Ports::free()?,
            binaries: binaries.to_owned(),
            environment,
        };
        let system = System::prepare(&Tools::find()?, stack_folder, options).await?;
        Ok(Self {
            system,
            _folder: folder,
        })
    }

    /// Starts all parts, with a proxy for each connection between them.
    pub async fn start_behind_proxies(
        binaries: &Path,
        environment: Vec<(String, String)>,
        seed: &mut Seed,
    ) -> anyhow::Result<(Self, Proxies)> {
        let mut stack = Self::prepare_in(binaries, environment).await?;
        let proxies = Proxies::open(&mut stack.system, seed).await?;
        stack.system.start_all(|_, _| {}).await?;
        Ok((stack, proxies))
    }
}

/// The folder of our own programs: target/PROFILE. Tests are in target/PROFILE/deps.
pub fn own_programs() -> anyhow::Result<PathBuf> {
    let test = std::env::current_exe()?;
    Ok(test
        .ancestors()
        .nth(2)
        .context("the test is not in target/PROFILE/deps")?
        .to_owned())
}
