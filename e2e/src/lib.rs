//! Tests of the whole system through its front door (`tests/it`), the kill matrix (`src/kill_matrix.rs`), chaos, the
//! tests of the tests (`src/bounty.rs`), and the demonstration (`src/demo.rs`).

use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::Value;
use stack::http::{Answer, Http};
use tokio::time::Instant;
use uuid::Uuid;

pub mod broker;
pub mod chaos;
pub mod load;

const RETRY_DELAY: Duration = Duration::from_millis(20);

/// Sends a POST with a key of its own again and again, as a client should, while the answer is "away" or none at all.
pub async fn until_done(
    http: &Http,
    path: &str,
    body: &Value,
    within: Duration,
) -> anyhow::Result<Answer> {
    let key = Uuid::new_v4().to_string();
    let deadline = Instant::now() + within;
    loop {
        // No answer, or a cut one: the outcome is unknown, and the same key asks.
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
