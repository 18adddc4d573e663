//! One child process. Its output goes to a log file, and it ends when this process ends.

use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};

use crate::folder::{UNPRIVILEGED_ID, is_root};

/// A program to run.
#[derive(Clone, Debug)]
pub struct Program {
    /// For error messages.
    pub name: String,
    pub executable: PathBuf,
    pub arguments: Vec<String>,
    /// Added to the inherited variables, such as PATH and HOME.
    pub environment: Vec<(String, String)>,
    /// Gets standard output and standard error.
    pub log: PathBuf,
    /// Requests a graceful shutdown.
    pub stop_signal: Signal,
    /// Under root, run as `nobody`.
    pub unprivileged: bool,
}

#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    pid: Pid,
    stop_signal: Signal,
}

/// Time from the stop signal to SIGKILL.
const STOP_TIMEOUT: Duration = Duration::from_secs(15);

impl Process {
    /// Starts a program through `setpriv --pdeathsig`: the kernel sends it the stop signal when
    /// this process ends for any reason. `setpriv` execs the program, so the process id is the
    /// program's.
    pub fn start(program: &Program) -> anyhow::Result<Self> {
        let log = File::options().create(true).append(true).open(&program.log);
        let log =
            log.with_context(|| format!("the log {} cannot be written", program.log.display()))?;
        let mut command = Command::new("setpriv");
        command
            .arg("--pdeathsig")
            .arg(signal_name(program.stop_signal));
        if program.unprivileged && is_root() {
            command
                .args([
                    format!("--reuid={UNPRIVILEGED_ID}"),
                    format!("--regid={UNPRIVILEGED_ID}"),
                ])
                .arg("--clear-groups");
        }
        command
            .arg("--")
            .arg(&program.executable)
            .args(&program.arguments)
            .env_clear();
        for inherited in ["PATH", "HOME", "LANG", "RUST_LOG", "RUST_BACKTRACE"] {
            if let Some(value) = std::env::var_os(inherited) {
                command.env(inherited, value);
            }
        }
        let child = command
            .envs(
                program
                    .environment
                    .iter()
                    .map(|(name, value)| (name, value)),
            )
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            // Its own process group: Ctrl-C must reach only this process, and this process stops
            // the others in order.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("{} cannot be started", program.name))?;
        let pid = child
            .id()
            .and_then(|id| Pid::from_raw(i32::try_from(id).ok()?))
            .context("the process ended at once")?;
        Ok(Self {
            name: program.name.clone(),
            child,
            pid,
            stop_signal: program.stop_signal,
        })
    }

    pub fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// The exit status; `None` while the process runs.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Sends the stop signal and waits. Kills the process after a timeout.
    pub async fn stop(self) -> anyhow::Result<()> {
        let signal = self.stop_signal;
        self.stop_by(signal).await
    }

    /// Like [`Self::stop`], but with another signal.
    pub async fn stop_by(mut self, signal: Signal) -> anyhow::Result<()> {
        if self.ended().is_some() {
            return Ok(());
        }
        self.signal(signal)?;
        // A paused process cannot react.
        self.signal(Signal::CONT)?;
        if tokio::time::timeout(STOP_TIMEOUT, self.child.wait())
            .await
            .is_err()
        {
            self.kill().await?;
            anyhow::bail!(
                "{} did not stop within {STOP_TIMEOUT:?} and was killed",
                self.name
            );
        }
        Ok(())
    }

    /// Sends SIGKILL.
    pub async fn kill(&mut self) -> anyhow::Result<()> {
        self.child
            .kill()
            .await
            .with_context(|| format!("{} cannot be killed", self.name))
    }

    /// Sends a signal: `Signal::STOP` pauses the process, `Signal::CONT` resumes it.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        match kill_process(self.pid, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => {
                Err(error).with_context(|| format!("{} cannot be sent a signal", self.name))
            }
        }
    }
}

/// The signal's name as `setpriv` expects it.
fn signal_name(signal: Signal) -> &'static str {
    match signal {
        Signal::INT => "INT",
        Signal::KILL => "KILL",
        _ => "TERM",
    }
}

/// The last lines of a log file.
pub fn tail(log: &Path, lines: usize) -> String {
    const BYTES_MAX: u64 = 16 * 1024;
    let read = || -> std::io::Result<Vec<u8>> {
        let length = fs::metadata(log)?.len();
        let mut file = File::open(log)?;
        file.seek(SeekFrom::Start(length.saturating_sub(BYTES_MAX)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let text = String::from_utf8_lossy(&read().unwrap_or_default()).into_owned();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
