//! Builds an older commit of this repository.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};

const REPOSITORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// A built older version.
pub(crate) struct Old {
    /// The abbreviated commit.
    pub(crate) commit: String,
    /// The folder with its programs.
    pub(crate) binaries: PathBuf,
    /// Its configuration of the broker.
    pub(crate) nats_configuration: PathBuf,
}

impl Old {
    /// Checks the commit out into a worktree below `folder` and builds the services with a target
    /// folder of their own. Both are kept, so that the next run is quick.
    pub(crate) fn build(name: &str, folder: &Path) -> anyhow::Result<Self> {
        let hash = git(&["rev-parse", "--verify", &format!("{name}^{{commit}}")])
            .with_context(|| {
                format!(
                    "{name:?} is not a commit of this repository (in a shallow clone: git fetch --unshallow)"
                )
            })?;
        let commit = git(&["rev-parse", "--short=10", &hash])?;
        std::fs::create_dir_all(folder)
            .with_context(|| format!("{} cannot be created", folder.display()))?;
        let source = folder.join(format!("source-{commit}"));
        let target = folder.join("target");
        if git_in(&source, &["rev-parse", "HEAD"]).ok().as_deref() != Some(hash.as_str()) {
            let path = source.display().to_string();
            // `--force`: the folder of an earlier worktree may have been deleted.
            git(&["worktree", "add", "--force", "--detach", &path, &hash])?;
        }
        eprintln!("Building {commit} in {} ...", target.display());
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo
            .args(["build", "--locked"])
            .args(["orders", "payments", "gateway"].map(|program| format!("--bin={program}")))
            .arg("--target-dir")
            .arg(&target)
            .current_dir(&source)
            .stdin(Stdio::null());
        let status = cargo.status().context("cargo cannot be started")?;
        ensure!(status.success(), "{commit} cannot be built");
        let nats_configuration = source.join("nats/single.conf");
        ensure!(
            nats_configuration.exists(),
            "{commit} is too old: it has no nats/single.conf"
        );
        Ok(Self {
            commit,
            binaries: target.join("debug"),
            nats_configuration,
        })
    }
}

/// Runs git in this repository and returns what it prints.
fn git(arguments: &[&str]) -> anyhow::Result<String> {
    git_in(Path::new(REPOSITORY), arguments)
}

fn git_in(folder: &Path, arguments: &[&str]) -> anyhow::Result<String> {
    let output = Command::new("git")
        .arg("-C")
        .arg(folder)
        .args(arguments)
        .output()
        .context("git cannot be started")?;
    ensure!(
        output.status.success(),
        "git {} failed: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
