//! How `status`, `stop`, `start` and `down` reach the process that keeps a stack running: one JSON line each way over
//! a socket in the stack's folder.

use std::hash::{Hash as _, Hasher as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};

const ANSWER_TIMEOUT: Duration = Duration::from_secs(90);
/// The path of a socket must fit into 108 bytes.
const PATH_BYTES_MAX: usize = 100;

/// What can be asked of a running stack.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum Request {
    /// How everything is.
    Status,
    /// Starts one part.
    Start {
        /// Which.
        name: String,
    },
    /// Stops one part, and leaves it stopped.
    Stop {
        /// Which.
        name: String,
    },
    /// Stops everything.
    Down,
}

#[derive(Serialize, Deserialize)]
struct Reply {
    error: Option<String>,
    value: Value,
}

fn socket(folder: &Path) -> PathBuf {
    let path = folder.join("control.sock");
    if path.as_os_str().len() <= PATH_BYTES_MAX {
        return path;
    }
    let mut hash = std::hash::DefaultHasher::new();
    folder.hash(&mut hash);
    let name = hash.finish();
    std::env::temp_dir().join(format!("gozon-{name:016x}.sock"))
}

/// Opens the socket. The caller holds the folder's lock, so an old socket is nobody's.
pub(crate) fn listen(folder: &Path) -> anyhow::Result<UnixListener> {
    let path = socket(folder);
    if path.exists() {
        std::fs::remove_file(&path)?;
    }
    UnixListener::bind(&path).with_context(|| format!("{} cannot be opened", path.display()))
}

/// Takes the socket away.
pub(crate) fn close(folder: &Path) {
    // Not there is just as well.
    let _ = std::fs::remove_file(socket(folder));
}

/// Reads one request.
pub(crate) async fn read(stream: UnixStream) -> anyhow::Result<(Request, UnixStream)> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    tokio::time::timeout(Duration::from_secs(2), reader.read_line(&mut line))
        .await
        .context("nothing was asked")??;
    Ok((serde_json::from_str(&line)?, reader.into_inner()))
}

/// Answers one request.
pub(crate) async fn reply(
    mut stream: UnixStream,
    answer: anyhow::Result<Value>,
) -> anyhow::Result<()> {
    let reply = match answer {
        Ok(value) => Reply { error: None, value },
        Err(error) => Reply {
            error: Some(format!("{error:#}")),
            value: Value::Null,
        },
    };
    stream
        .write_all(format!("{}\n", serde_json::to_string(&reply)?).as_bytes())
        .await?;
    Ok(())
}

/// Asks the stack of `folder`. `None`: none is running there.
pub async fn ask(folder: &Path, request: &Request) -> anyhow::Result<Option<Value>> {
    let Ok(folder) = folder.canonicalize() else {
        return Ok(None);
    };
    let Ok(mut stream) = UnixStream::connect(socket(&folder)).await else {
        return Ok(None);
    };
    stream
        .write_all(format!("{}\n", serde_json::to_string(request)?).as_bytes())
        .await?;
    let mut line = String::new();
    let mut reader = BufReader::new(stream);
    let read = reader.read_line(&mut line);
    tokio::time::timeout(ANSWER_TIMEOUT, read)
        .await
        .with_context(|| format!("the stack did not answer within {ANSWER_TIMEOUT:?}"))??;
    let reply: Reply = serde_json::from_str(&line).context("the stack ended while it was asked")?;
    match reply.error {
        Some(error) => bail!(error),
        None => Ok(Some(reply.value)),
    }
}
