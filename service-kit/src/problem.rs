//! Errors as problem documents (RFC 9457): one shape for every answer that is no success, from every layer.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::idempotency::IdempotencyKey;

/// Media type of a problem document.
pub const CONTENT_TYPE: &str = "application/problem+json";

const OVERLOADED: &str = "overloaded";

/// An answer that is no success. As a response it has no body yet: the outermost layer
/// ([`crate::http::edge`]) knows the request id and writes the document, in one place for all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    status: StatusCode,
    code: &'static str,
    detail: String,
    errors: Vec<FieldError>,
    retry_after_seconds: Option<u32>,
    unknown_outcome: Option<String>,
}

/// What is wrong with one part of the request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct FieldError {
    /// JSON pointer into the body, or the name of a parameter or header.
    #[schema(example = "/amount")]
    pub pointer: String,
    /// What it must be.
    #[schema(example = "must be an integer from 1 to 1000000000000, in minor units")]
    pub detail: String,
}

/// A problem document (RFC 9457).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = Problem)]
pub struct ProblemDocument {
    /// Identifies the kind of problem.
    #[serde(rename = "type")]
    #[schema(example = "/problems/validation_failed")]
    pub kind: String,
    /// The kind of problem in words.
    #[schema(example = "Validation failed")]
    pub title: String,
    /// HTTP status.
    #[schema(example = 422)]
    pub status: u16,
    /// What happened and what to do.
    pub detail: String,
    /// The kind of problem for programs.
    #[schema(example = "validation_failed")]
    pub code: String,
    /// Name it when you ask for help.
    pub request_id: String,
    /// What is wrong with which part of the request.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(required = false)]
    pub errors: Vec<FieldError>,
    /// `unknown`: the request may or may not have been done. Send it again with `idempotency_key`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outcome: Option<&'static str>,
    /// The key to send it again with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idempotency_key: Option<String>,
}

impl Problem {
    /// `code` is snake_case and stable; `detail` says what happened and what to do.
    pub fn new(status: StatusCode, code: &'static str, detail: impl Into<String>) -> Self {
        Self {
            status,
            code,
            detail: detail.into(),
            errors: Vec::new(),
            retry_after_seconds: None,
            unknown_outcome: None,
        }
    }

    /// The request was understood, but parts of it are not acceptable.
    pub fn validation(errors: Vec<FieldError>) -> Self {
        let detail = match errors.as_slice() {
            // What has no name is named in the detail.
            [one] if one.detail.starts_with("the ") => capitalised(format!("{}.", one.detail)),
            [one] => format!("{} {}.", one.pointer, one.detail),
            several => format!(
                "{} parts of the request are not acceptable; see errors.",
                several.len()
            ),
        };
        Self {
            errors,
            ..Self::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "validation_failed",
                detail,
            )
        }
    }

    /// A service that is needed is away; nothing was done.
    pub fn unavailable(detail: impl Into<String>) -> Self {
        Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "service_unavailable",
            detail,
        )
        .retry_after(1)
    }

    /// Turned away because there is too much to do; nothing was done.
    pub fn overloaded(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, OVERLOADED, detail).retry_after(1)
    }

    /// A bug of ours, or data that nobody expected; nothing was done. The cause belongs into the log, not here.
    pub fn internal() -> Self {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "internal_error",
            "Something went wrong on our side. Nothing was done.",
        )
    }

    /// A service was lost midway. A request with a key may or may not have been done, and the key tells.
    pub fn in_doubt(detail: impl Into<String>, key: Option<&IdempotencyKey>) -> Self {
        let problem = Self::unavailable(detail);
        match key {
            Some(key) => problem.outcome_unknown(key.as_str()),
            None => problem,
        }
    }

    /// Says when trying again makes sense.
    #[must_use]
    pub fn retry_after(mut self, seconds: u32) -> Self {
        self.retry_after_seconds = Some(seconds);
        self
    }

    /// The request may or may not have been done; sent again with `idempotency_key` it is done once and says so.
    #[must_use]
    pub fn outcome_unknown(mut self, idempotency_key: impl Into<String>) -> Self {
        self.unknown_outcome = Some(idempotency_key.into());
        self
    }

    /// The HTTP status.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// The kind of problem for programs.
    pub(crate) fn code(&self) -> &'static str {
        self.code
    }

    /// Whether it turns a request away because there is too much to do, or too much from one client.
    pub(crate) fn sheds(&self) -> bool {
        self.code == OVERLOADED || self.status == StatusCode::TOO_MANY_REQUESTS
    }

    /// When trying again makes sense, if that is known.
    pub(crate) fn retry_after_seconds(&self) -> Option<u32> {
        self.retry_after_seconds
    }

    /// The document, for the request with this id.
    pub fn into_document(self, request_id: &str) -> ProblemDocument {
        ProblemDocument {
            kind: format!("/problems/{}", self.code),
            title: title(self.code),
            status: self.status.as_u16(),
            detail: self.detail,
            code: self.code.to_owned(),
            request_id: request_id.to_owned(),
            errors: self.errors,
            outcome: self.unknown_outcome.is_some().then_some("unknown"),
            idempotency_key: self.unknown_outcome,
        }
    }
}

fn title(code: &str) -> String {
    capitalised(
        code.replace('_', " ")
            .replace("json", "JSON")
            .replace("url", "URL"),
    )
}

fn capitalised(mut words: String) -> String {
    if let Some(first) = words.get_mut(..1) {
        first.make_ascii_uppercase();
    }
    words
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut response = self.status.into_response();
        if let Some(seconds) = self.retry_after_seconds {
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        // Part of the body is still to come, and nobody will read it.
        if matches!(
            self.status,
            StatusCode::PAYLOAD_TOO_LARGE | StatusCode::REQUEST_TIMEOUT
        ) {
            response
                .headers_mut()
                .insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response.extensions_mut().insert(self);
        response
    }
}
