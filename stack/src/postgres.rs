//! A PostgreSQL server.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context as _, ensure};
use rustix::process::Signal;
use sea_orm::{
    ConnectOptions, ConnectionTrait as _, Database, DatabaseConnection, DbBackend, Statement,
};
use tokio::process::Command;

use crate::folder::{UNPRIVILEGED_ID, chown_to_postgres, is_root};
use crate::process::{Program, tail};
use crate::tools::Tools;

const SUPERUSER: &str = "postgres";

/// A server: its files, port and password.
#[derive(Clone)]
pub struct Postgres {
    /// The folder with `postgres` and `initdb`.
    pub programs: PathBuf,
    pub data: PathBuf,
    pub log: PathBuf,
    /// On 127.0.0.1.
    pub port: u16,
    /// The superuser's password.
    pub password: String,
    /// Additional settings, `name=value`.
    pub settings: Vec<String>,
}

impl Postgres {
    /// A server for a data folder. Uses the PostgreSQL version that created the folder.
    pub fn new(
        tools: &Tools,
        data: PathBuf,
        log: PathBuf,
        port: u16,
        password: String,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            programs: tools.postgres_for(&data)?.to_owned(),
            data,
            log,
            port,
            password,
            settings: Vec::new(),
        })
    }

    /// Creates the data folder unless it exists.
    pub async fn initialize(&self) -> anyhow::Result<()> {
        if self.data.join("PG_VERSION").exists() {
            return Ok(());
        }
        // Created under a temporary name and renamed, so that an interruption leaves no incomplete
        // folder.
        let draft = self.data.with_extension("new");
        if draft.exists() {
            fs::remove_dir_all(&draft)?;
        }
        fs::create_dir(&draft).with_context(|| format!("{} cannot be created", draft.display()))?;
        fs::set_permissions(&draft, Permissions::from_mode(0o700))?;
        chown_to_postgres(&draft)?;
        let password_file = self.data.with_extension("password");
        fs::write(&password_file, "")?;
        fs::set_permissions(&password_file, Permissions::from_mode(0o600))?;
        fs::write(&password_file, &self.password)?;
        chown_to_postgres(&password_file)?;
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(&self.log)?;

        let mut command = if is_root() {
            let mut command = Command::new("setpriv");
            command.args([
                format!("--reuid={UNPRIVILEGED_ID}"),
                format!("--regid={UNPRIVILEGED_ID}"),
            ]);
            command
                .args(["--clear-groups", "--"])
                .arg(self.programs.join("initdb"));
            command
        } else {
            Command::new(self.programs.join("initdb"))
        };
        // In the C locale text is sorted by bytes, as in Rust.
        let status = command
            .args([
                "--username",
                SUPERUSER,
                "--auth",
                "scram-sha-256",
                "--encoding",
                "UTF8",
                "--locale",
                "C",
                "--no-instructions",
            ])
            .arg("--pwfile")
            .arg(&password_file)
            .arg("--pgdata")
            .arg(&draft)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .status()
            .await
            .context("initdb cannot be started")?;
        fs::remove_file(&password_file)?;
        ensure!(
            status.success(),
            "initdb failed ({status}). The end of {}:\n{}",
            self.log.display(),
            tail(&self.log, 15)
        );
        fs::rename(&draft, &self.data)?;
        Ok(())
    }

    pub fn program(&self) -> Program {
        let mut arguments = vec![
            "-D".to_owned(),
            self.data.display().to_string(),
            "-p".to_owned(),
            self.port.to_string(),
        ];
        let settings = [
            "listen_addresses=127.0.0.1",
            "unix_socket_directories=",
            "log_line_prefix=%m [%p] %q%u@%d ",
        ];
        for setting in settings
            .into_iter()
            .map(str::to_owned)
            .chain(self.settings.iter().cloned())
        {
            arguments.extend(["-c".to_owned(), setting]);
        }
        Program {
            name: "postgres".to_owned(),
            executable: self.programs.join("postgres"),
            arguments,
            environment: Vec::new(),
            log: self.log.clone(),
            // Fast shutdown: ends sessions and writes a checkpoint.
            stop_signal: Signal::INT,
            unprivileged: true,
        }
    }

    pub async fn is_ready(&self) -> bool {
        self.connect(SUPERUSER).await.is_ok()
    }

    /// Connects as superuser.
    pub async fn connect(&self, database: &str) -> anyhow::Result<DatabaseConnection> {
        let mut options = ConnectOptions::new(self.url(SUPERUSER, &self.password, database));
        options
            .max_connections(1)
            .connect_timeout(std::time::Duration::from_secs(2))
            .sqlx_logging(false);
        Database::connect(options)
            .await
            .context("PostgreSQL does not accept connections")
    }

    pub fn url(&self, role: &str, password: &str, database: &str) -> String {
        format!(
            "postgres://{role}:{password}@127.0.0.1:{}/{database}",
            self.port
        )
    }

    /// Creates a role and a database of the same name, unless they exist. No other role may use the
    /// database.
    pub async fn ensure_database(&self, name: &str, password: &str) -> anyhow::Result<()> {
        ensure!(
            name.bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_'),
            "{name:?} is not a database name"
        );
        ensure!(
            password.bytes().all(|byte| byte.is_ascii_alphanumeric()),
            "the password must contain only letters and digits"
        );
        let db = self.connect("postgres").await?;
        let exists = async |query: &str| {
            let found = db
                .query_one_raw(Statement::from_sql_and_values(
                    DbBackend::Postgres,
                    query,
                    [name.into()],
                ))
                .await;
            found.map(|row| row.is_some())
        };
        if !exists("SELECT 1 FROM pg_roles WHERE rolname = $1").await? {
            db.execute_unprepared(&format!("CREATE ROLE {name} LOGIN PASSWORD '{password}'"))
                .await?;
        }
        if !exists("SELECT 1 FROM pg_database WHERE datname = $1").await? {
            db.execute_unprepared(&format!("CREATE DATABASE {name} OWNER {name}"))
                .await?;
        }
        db.execute_unprepared(&format!("REVOKE ALL ON DATABASE {name} FROM PUBLIC"))
            .await?;
        db.close().await?;
        Ok(())
    }

    /// Denies the services' roles access to the superuser's database.
    pub async fn close_superuser_database(&self) -> anyhow::Result<()> {
        let db = self.connect("postgres").await?;
        db.execute_unprepared("REVOKE ALL ON DATABASE postgres FROM PUBLIC")
            .await?;
        db.execute_unprepared("REVOKE ALL ON DATABASE template1 FROM PUBLIC")
            .await?;
        db.close().await?;
        Ok(())
    }
}
