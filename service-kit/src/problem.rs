//! Problem documents (RFC 9457): the format of every error response, from every layer.

use std::borrow::Cow;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

mod code;

pub use code::Code;

pub const CONTENT_TYPE: &str = "application/problem+json";

const RETRY_AFTER_SECONDS: u32 = 1;
const UNKNOWN_OUTCOME_ADVICE: &str = "The request may or may not have been executed: send it again \
                                      with the idempotency_key named here, and it is executed \
                                      once.";

/// An error response without a body. The outermost layer ([`crate::http::edge`]) adds the document,
/// because it knows the request id and the idempotency key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    code: Code,
    status: StatusCode,
    cause: Cow<'static, str>,
    errors: Vec<FieldError>,
    retry_after_seconds: Option<u32>,
    outcome_unknown: bool,
}

/// What is wrong with one part of the request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct FieldError {
    /// JSON pointer into the body, or the name of a parameter or header.
    #[schema(example = "/user_id")]
    pub pointer: String,
    /// What it must be.
    #[schema(example = "is missing")]
    pub detail: String,
}

/// A problem document (RFC 9457).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = Problem)]
pub struct ProblemDocument {
    /// A page about this kind of problem.
    #[serde(rename = "type")]
    #[schema(format = "uri-reference", example = "/problems/validation_failed")]
    pub kind: String,
    /// The kind of problem in words.
    #[schema(example = "Validation failed")]
    pub title: &'static str,
    /// HTTP status.
    #[schema(example = 422)]
    pub status: u16,
    /// What is wrong, and what to do.
    pub detail: String,
    pub code: Code,
    /// Include it when you report a problem.
    pub request_id: String,
    /// Every part of the request that is not acceptable.
    pub errors: Vec<FieldError>,
    /// `unknown` if the request may or may not have been executed: send it again with
    /// `idempotency_key`. Otherwise null.
    #[schema(required = true)]
    pub outcome: Option<Outcome>,
    /// The key for sending the request again, if the outcome is unknown. Otherwise null.
    #[schema(required = true)]
    pub idempotency_key: Option<String>,
}

/// `unknown`: the request may or may not have been executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = ProblemOutcome)]
pub enum Outcome {
    Unknown,
}

impl Problem {
    pub fn new(code: Code) -> Self {
        let retry_after_seconds = matches!(
            code,
            Code::Overloaded | Code::ServiceUnavailable | Code::NotReady | Code::RequestInProgress
        )
        .then_some(RETRY_AFTER_SECONDS);
        Self {
            code,
            status: code.status(),
            cause: code.cause().into(),
            errors: Vec::new(),
            retry_after_seconds,
            outcome_unknown: false,
        }
    }

    /// The request can be read, but these parts of it are invalid.
    pub fn validation(errors: Vec<FieldError>) -> Self {
        let cause = match errors.as_slice() {
            [one] if one.pointer.is_empty() => capitalised(format!("{}.", one.detail)),
            [one] => format!("{}: {}.", one.pointer, one.detail),
            several => format!("{} parts of the request are not acceptable.", several.len()),
        };
        Self {
            errors,
            ..Self::new(Code::ValidationFailed).because(cause)
        }
    }

    /// For an error status from a layer that does not know problem documents.
    pub fn from_status(status: StatusCode) -> Self {
        let code = match status {
            StatusCode::BAD_REQUEST => Code::BadRequest,
            StatusCode::NOT_FOUND => Code::NotFound,
            StatusCode::METHOD_NOT_ALLOWED => Code::MethodNotAllowed,
            StatusCode::PAYLOAD_TOO_LARGE => Code::BodyTooLarge,
            _ if status.is_server_error() => Code::InternalError,
            _ => Code::RequestRefused,
        };
        Self {
            status,
            ..Self::new(code)
        }
    }

    /// Replaces the general cause of the code with a more exact sentence.
    #[must_use]
    pub fn because(mut self, cause: impl Into<Cow<'static, str>>) -> Self {
        self.cause = cause.into();
        self
    }

    /// Names the service if the code is [`Code::ServiceUnavailable`].
    #[must_use]
    pub fn of_service(self, name: &str) -> Self {
        match self.code {
            Code::ServiceUnavailable => self.because(format!("{name} temporarily unavailable.")),
            _ => self,
        }
    }

    #[must_use]
    pub fn retry_after(mut self, seconds: u32) -> Self {
        self.retry_after_seconds = Some(seconds);
        self
    }

    /// Marks that the request may or may not have been executed. For a POST, the document contains
    /// the idempotency key.
    #[must_use]
    pub fn outcome_unknown(mut self) -> Self {
        self.outcome_unknown = true;
        self
    }

    pub fn status(&self) -> StatusCode {
        self.status
    }

    pub(crate) fn code(&self) -> Code {
        self.code
    }

    /// Builds the document. `key` is the idempotency key of the request, if it has one.
    pub fn into_document(self, request_id: &str, key: Option<&str>) -> ProblemDocument {
        let key = key.filter(|_| self.outcome_unknown);
        let advice = match key {
            Some(_) => UNKNOWN_OUTCOME_ADVICE,
            None => self.code.advice(),
        };
        ProblemDocument {
            kind: format!("/problems/{}", self.code.as_str()),
            title: self.code.title(),
            status: self.status.as_u16(),
            detail: format!("{} {advice}", self.cause),
            code: self.code,
            request_id: request_id.to_owned(),
            errors: self.errors,
            outcome: key.map(|_| Outcome::Unknown),
            idempotency_key: key.map(str::to_owned),
        }
    }
}

impl From<Code> for Problem {
    fn from(code: Code) -> Self {
        Self::new(code)
    }
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
        // The connection cannot be reused: the rest of the body may still arrive, and is not read.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cause_and_advice_of_every_code_are_one_sentence_each() {
        for code in Code::ALL {
            let name = serde_json::to_value(code).unwrap();
            assert_eq!(name, code.as_str());
            assert!(!code.status().is_success(), "{name}");
            for sentence in [code.cause(), code.advice()] {
                assert!(
                    sentence.starts_with(|first: char| first.is_ascii_uppercase())
                        && sentence.ends_with('.')
                        && !sentence.contains(". "),
                    "{name}: {sentence}"
                );
            }
        }
    }

    #[test]
    fn only_a_request_with_a_key_has_an_unknown_outcome() {
        let problem = Problem::new(Code::ServiceUnavailable).outcome_unknown();
        let document = problem.clone().into_document("id", Some("lamp"));
        assert_eq!(document.outcome, Some(Outcome::Unknown));
        assert_eq!(document.idempotency_key.as_deref(), Some("lamp"));
        assert!(document.detail.ends_with(UNKNOWN_OUTCOME_ADVICE));
        let document = problem.into_document("id", None);
        assert_eq!((document.outcome, document.idempotency_key), (None, None));
        let known = Problem::new(Code::Overloaded).into_document("id", Some("lamp"));
        assert_eq!((known.outcome, known.idempotency_key), (None, None));
    }
}
