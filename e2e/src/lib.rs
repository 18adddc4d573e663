//! Shared by the tests of the whole system (`tests/it`) and the programs in `programs`: demo,
//! bench, overload, kill matrix, bounty and chaos.

use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::Value;
use stack::http::{Answer, Http};
use tokio::time::Instant;
use uuid::Uuid;

pub mod broker;
pub mod checks;
pub mod load;
pub mod test_names;

/// Timers of the services, as short as possible: with the defaults, recovery may take 10 minutes.
pub const SHORT_TIMERS: [(&str, &str); 3] = [
    ("GOZON_ACK_WAIT_MS", "1000"),
    ("GOZON_ASK_AGAIN_MS", "2000"),
    ("GOZON_ASK_AGAIN_MAX_MS", "10000"),
];

const RETRY_DELAY: Duration = Duration::from_millis(20);

/// Sends a POST with a new key, and retries it as a client should: while the answer is 503, or
/// there is none.
pub async fn until_done(
    http: &Http,
    path: &str,
    body: &Value,
    within: Duration,
) -> anyhow::Result<Answer> {
    let key = Uuid::new_v4().to_string();
    let deadline = Instant::now() + within;
    loop {
        // Without a complete answer the outcome is unknown; a retry with the same key resolves it.
        let answer = http.post(path, Some(&key), body).await;
        match answer {
            Ok(answer) if answer.status == 201 => return Ok(answer),
            Ok(answer) if answer.status != 503 => {
                bail!("{} for {path} {body}: {}", answer.status, answer.text())
            }
            _ if Instant::now() > deadline => {
                return answer
                    .with_context(|| format!("{path} {body} was not done within {within:?}"));
            }
            _ => tokio::time::sleep(RETRY_DELAY).await,
        }
    }
}
