//! The folder of a stack: its data, logs and passwords.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// PostgreSQL refuses to run as root. Under root it runs as this user (`nobody`).
pub(crate) const UNPRIVILEGED_ID: u32 = 65534;

#[derive(Clone, Debug)]
pub struct StackFolder {
    path: PathBuf,
    /// Generated once, when the folder is created.
    pub secrets: Secrets,
}

/// Passwords. All are random except the one of `viewer`, a user who can only read streams.
#[derive(Clone, Serialize, Deserialize)]
pub struct Secrets {
    // PostgreSQL roles.
    pub postgres_superuser: String,
    pub postgres_orders: String,
    pub postgres_payments: String,
    // NATS users.
    pub nats_sys: String,
    pub nats_orders: String,
    pub nats_payments: String,
    pub nats_gateway: String,
    pub nats_ops: String,
    pub nats_viewer: String,
    /// Folders of older versions lack it.
    #[serde(default = "random")]
    pub nats_reader: String,
}

fn random() -> String {
    // Starts with a letter, because nats-server parses a value of digits as a number.
    format!("p{}", Uuid::new_v4().simple())
}

impl std::fmt::Debug for Secrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secrets(***)")
    }
}

impl Secrets {
    fn random() -> Self {
        Self {
            postgres_superuser: random(),
            postgres_orders: random(),
            postgres_payments: random(),
            nats_sys: random(),
            nats_orders: random(),
            nats_payments: random(),
            nats_gateway: random(),
            nats_ops: random(),
            nats_viewer: "viewer".to_owned(),
            nats_reader: random(),
        }
    }
}

impl StackFolder {
    /// Opens the folder. Creates it if it does not exist.
    pub fn open(folder: &Path) -> anyhow::Result<Self> {
        fs::create_dir_all(folder.join("logs"))
            .with_context(|| format!("the folder {} cannot be created", folder.display()))?;
        let folder = folder
            .canonicalize()
            .with_context(|| format!("the folder {} cannot be found", folder.display()))?;
        if is_root() {
            fs::set_permissions(&folder, Permissions::from_mode(0o755))?;
            ensure!(
                reachable_by_nobody(&folder),
                "PostgreSQL does not run as root but as `nobody`, and `nobody` cannot enter {}: set \
                 GOZON_DIR to a folder that every user can enter, such as /var/tmp/gozon",
                folder.display()
            );
        }
        let secrets = read_or_create_secrets(&folder.join("secrets.json"))?;
        Ok(Self {
            path: folder,
            secrets,
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn log(&self, name: &str) -> PathBuf {
        self.path.join("logs").join(format!("{name}.log"))
    }

    /// The data folder of PostgreSQL.
    pub fn postgres_data(&self) -> PathBuf {
        self.path.join("postgres")
    }

    /// The data folder of NATS.
    pub fn nats_data(&self) -> PathBuf {
        self.path.join("nats")
    }
}

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Gives a file or folder to the user that PostgreSQL runs as.
pub(crate) fn chown_to_postgres(path: &Path) -> std::io::Result<()> {
    if is_root() {
        chown(path, Some(UNPRIVILEGED_ID), Some(UNPRIVILEGED_ID))
    } else {
        Ok(())
    }
}

fn reachable_by_nobody(folder: &Path) -> bool {
    Command::new("setpriv")
        .args([
            format!("--reuid={UNPRIVILEGED_ID}"),
            format!("--regid={UNPRIVILEGED_ID}"),
        ])
        .args(["--clear-groups", "test", "-x"])
        .arg(folder)
        .stdin(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

fn read_or_create_secrets(path: &Path) -> anyhow::Result<Secrets> {
    match fs::read_to_string(path) {
        Ok(text) => {
            let secrets: Secrets = serde_json::from_str(&text)
                .with_context(|| format!("{} is not valid", path.display()))?;
            if !text.contains("nats_reader") {
                write_secrets(path, &secrets)?;
            }
            Ok(secrets)
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let secrets = Secrets::random();
            write_secrets(path, &secrets)?;
            Ok(secrets)
        }
        Err(error) => Err(error).with_context(|| format!("{} cannot be read", path.display())),
    }
}

fn write_secrets(path: &Path, secrets: &Secrets) -> anyhow::Result<()> {
    // Written to a temporary file and renamed, so that an interruption leaves no incomplete file.
    let draft = path.with_extension("new");
    fs::write(&draft, "")?;
    fs::set_permissions(&draft, Permissions::from_mode(0o600))?;
    fs::write(&draft, serde_json::to_string_pretty(secrets)?)?;
    fs::rename(&draft, path)?;
    Ok(())
}
