//! What a client observed: one JSON line per exchange with the API. `gozon audit --history` checks
//! such a file.
//!
//! ```json
//! {"begun_us":10,"ended_us":4100,"method":"POST","path":"/v1/orders","key":"k1","body":{"user_id":"alice","amount":7},"status":201,"answer":"{\"id\":\"01…\",…}"}
//! {"begun_us":4200,"ended_us":14200,"method":"POST","path":"/v1/accounts/alice/deposits","key":"k2","body":{"amount":5}}
//! {"begun_us":5000,"ended_us":6000,"method":"GET","path":"/v1/orders/01…","status":200,"answer":"{\"id\":\"01…\",\"status\":\"FINISHED\",…}"}
//! ```
//!
//! Every request is recorded, including each retry and each request without an answer. A request
//! without an answer has no status; its outcome is unknown. No other client may act for the users
//! of a history, because the audit reports every row that no request of the history explains.

use std::path::Path;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// One request and its answer, if there was one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exchange {
    /// When the request was sent, in microseconds since a start common to all exchanges.
    pub begun_us: u64,
    /// When the answer was complete or the client gave up.
    pub ended_us: u64,
    /// `GET` or `POST`.
    pub method: String,
    /// With the query string.
    pub path: String,
    /// The `Idempotency-Key` header.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub body: Value,
    /// `None` if no answer came.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// Whether the answer had `Idempotency-Replayed: true`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub replayed: bool,
    /// The body of the answer, byte for byte.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub answer: String,
}

#[derive(Clone, Debug, Default)]
pub struct History {
    /// In any order.
    pub exchanges: Vec<Exchange>,
}

impl History {
    /// Reads a file. Ignores an incomplete last line, which a killed client leaves behind.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("{} cannot be read", path.display()))?;
        Self::parse(&text).with_context(|| format!("{} is not a valid history", path.display()))
    }

    fn parse(text: &str) -> anyhow::Result<Self> {
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let lines = whole
            .lines()
            .enumerate()
            .filter(|(_, line)| !line.trim().is_empty());
        let exchanges = lines.map(|(number, line)| {
            serde_json::from_str(line).with_context(|| format!("line {}", number + 1))
        });
        Ok(Self {
            exchanges: exchanges.collect::<anyhow::Result<_>>()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_written_history_is_read_without_an_incomplete_last_line() {
        let exchange = Exchange {
            begun_us: 1,
            ended_us: 2,
            method: "POST".to_owned(),
            path: "/v1/orders".to_owned(),
            key: Some("k".to_owned()),
            body: serde_json::json!({ "user_id": "alice", "amount": 7 }),
            status: None,
            replayed: false,
            answer: String::new(),
        };
        let line = serde_json::to_string(&exchange).unwrap();
        let history = History::parse(&format!("{line}\n{line}\n{}", &line[..20])).unwrap();
        assert_eq!(history.exchanges, [exchange.clone(), exchange]);
        let error = History::parse(&format!("{line}\nnonsense\n")).unwrap_err();
        assert_eq!(error.to_string(), "line 2");
    }
}
