//! A small HTTP client for readiness checks, tests and load generators.

use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;

const TIMEOUT: Duration = Duration::from_secs(45);

#[derive(Clone, Debug)]
pub struct Answer {
    pub status: u16,
    /// Header names are in lower case.
    pub headers: Vec<(String, String)>,
    pub body: Bytes,
}

impl Answer {
    /// The body as JSON; null if it is not JSON.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The first header with this name. `name` must be in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(other, _)| other == name)
            .map(|(_, value)| value.as_str())
    }
}

/// A response whose body is still being received.
#[derive(Debug)]
pub struct StreamingResponse {
    pub status: u16,
    pub content_type: String,
    body: Incoming,
}

impl StreamingResponse {
    /// The next chunk of the body; `None` if the body ended or the connection broke.
    pub async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Ok(bytes) = self.body.frame().await?.ok()?.into_data() {
                return Some(bytes);
            }
        }
    }
}

/// A client of one server.
#[derive(Clone, Debug)]
pub struct Http {
    client: Client<HttpConnector, Full<Bytes>>,
    base: String,
}

impl Http {
    /// `base` is `http://host:port`.
    pub fn new(base: impl Into<String>) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(Duration::from_secs(2)));
        Self {
            client: Client::builder(TokioExecutor::new()).build(connector),
            base: base.into(),
        }
    }

    pub fn base(&self) -> &str {
        &self.base
    }

    pub async fn get(&self, path: &str) -> anyhow::Result<Answer> {
        self.request("GET", path, &[], Bytes::new()).await
    }

    /// POST with a JSON body and an optional idempotency key.
    pub async fn post(
        &self,
        path: &str,
        key: Option<&str>,
        body: &Value,
    ) -> anyhow::Result<Answer> {
        let mut headers = vec![("content-type", "application/json")];
        headers.extend(key.map(|key| ("idempotency-key", key)));
        self.request("POST", path, &headers, body.to_string().into())
            .await
    }

    /// Sends a GET and returns as soon as the headers arrive. The body may never end.
    pub async fn open(
        &self,
        path: &str,
        headers: &[(&str, &str)],
    ) -> anyhow::Result<StreamingResponse> {
        let mut request = hyper::Request::get(format!("{}{path}", self.base));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request
            .body(Full::new(Bytes::new()))
            .context("the request is malformed")?;
        let (parts, body) = tokio::time::timeout(TIMEOUT, self.client.request(request))
            .await??
            .into_parts();
        let content_type = parts
            .headers
            .get("content-type")
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default()
            .to_owned();
        Ok(StreamingResponse {
            status: parts.status.as_u16(),
            content_type,
            body,
        })
    }

    pub async fn request(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: Bytes,
    ) -> anyhow::Result<Answer> {
        let mut request = hyper::Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request
            .body(Full::new(body))
            .context("the request is malformed")?;
        let exchange = async {
            let (parts, body) = self.client.request(request).await?.into_parts();
            let headers = parts.headers.iter();
            let headers = headers.map(|(name, value)| {
                (
                    name.to_string(),
                    String::from_utf8_lossy(value.as_bytes()).into_owned(),
                )
            });
            anyhow::Ok(Answer {
                status: parts.status.as_u16(),
                headers: headers.collect(),
                body: body.collect().await?.to_bytes(),
            })
        };
        tokio::time::timeout(TIMEOUT, exchange)
            .await
            .with_context(|| format!("{method} {path}: no answer within {TIMEOUT:?}"))?
    }
}
