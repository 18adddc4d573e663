//! Carries the commands `status`, `stop`, `start` and `down` to the supervisor of a stack. Request
//! and reply are one JSON line each, over a Unix socket in the stack's folder.

use std::hash::{Hash as _, Hasher as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};

const ANSWER_TIMEOUT: Duration = Duration::from_secs(90);
/// Linux limits the path of a socket to 108 bytes.
const PATH_BYTES_MAX: usize = 100;

/// A request to a running stack.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum Request {
    /// Returns the state of every part.
    Status,
    Start {
        name: String,
    },
    /// Stops one part until it is started again.
    Stop {
        name: String,
    },
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

/// Opens the socket. The caller holds the folder's lock, so no process uses an existing socket.
pub(crate) fn listen(folder: &Path) -> anyhow::Result<UnixListener> {
    let path = socket(folder);
    if path.exists() {
        std::fs::remove_file(&path)?;
    }
    UnixListener::bind(&path).with_context(|| format!("{} cannot be opened", path.display()))
}

pub(crate) fn close(folder: &Path) {
    // The socket may be deleted already.
    let _ = std::fs::remove_file(socket(folder));
}

pub(crate) async fn read(stream: UnixStream) -> anyhow::Result<(Request, UnixStream)> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    tokio::time::timeout(Duration::from_secs(2), reader.read_line(&mut line))
        .await
        .context("no request was sent")??;
    Ok((serde_json::from_str(&line)?, reader.into_inner()))
}

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

/// Sends a request to the stack of `folder`. Returns `None` if none is running.
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
    let reply: Reply = serde_json::from_str(&line).context("the stack ended before it answered")?;
    match reply.error {
        Some(error) => bail!(error),
        None => Ok(Some(reply.value)),
    }
}
