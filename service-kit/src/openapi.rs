//! The parts that all operations of an OpenAPI document share: errors that any request can get, an
//! example of each, and the headers of every response. Handlers document only what is specific to
//! them. utoipa cannot do this, because it describes one operation at a time.

use utoipa::openapi::header::HeaderBuilder;
use utoipa::openapi::path::Operation;
use utoipa::openapi::schema::{Object, SchemaType};
use utoipa::openapi::{
    ContentBuilder, Header, OpenApi, Ref, RefOr, Response, ResponseBuilder, Type,
};

use crate::problem::{CONTENT_TYPE, Code, FieldError, Problem};

const REQUEST_ID_EXAMPLE: &str = "01933f3c-7d5a-7b60-9d6f-3f0b4b1f2a11";

/// Adds the errors that any request can get to every operation; with `limited`, also 429. `codes`
/// are the service's own codes, for examples: the first code with the status of a response is its
/// example.
pub fn complete(document: &mut OpenApi, limited: bool, codes: &[Code]) {
    // Redocly requires an explicit statement that there is no login.
    document.security.get_or_insert_with(Vec::new);
    let mut used = Vec::new();
    for item in document.paths.paths.values_mut() {
        for (operation, has_body) in [(&mut item.get, false), (&mut item.post, true)] {
            let Some(operation) = operation else { continue };
            for (status, name, description) in COMMON {
                let applies = match status {
                    408 | 413 | 415 => has_body,
                    429 => limited,
                    _ => true,
                };
                if applies
                    && !operation
                        .responses
                        .responses
                        .contains_key(&status.to_string())
                {
                    let reference = RefOr::Ref(Ref::from_response_name(name));
                    operation
                        .responses
                        .responses
                        .insert(status.to_string(), reference);
                    used.push((status, name, description));
                }
            }
            add_headers_and_examples(operation, codes);
        }
    }
    let components = document.components.get_or_insert_with(Default::default);
    for (status, name, description) in used {
        let mut response = ResponseBuilder::new().description(description).build();
        // Headers that are too large are rejected by hyper, without a problem document.
        if status != 431 {
            response
                .content
                .insert(CONTENT_TYPE.to_owned(), RefOr::T(problem_content()));
            add_headers_and_example(status, &mut response, codes, false);
        }
        components
            .responses
            .insert(name.to_owned(), RefOr::T(response));
    }
}

const COMMON: [(u16, &str, &str); 9] = [
    (400, "BadRequest", "The request cannot be read"),
    (408, "RequestTimeout", "The body was not complete in time"),
    (413, "BodyTooLarge", "The body is too large"),
    (414, "UrlTooLong", "Path and query are too long"),
    (
        415,
        "UnsupportedMediaType",
        "The body is not application/json",
    ),
    (
        429,
        "TooManyRequests",
        "Too many requests from this address or for this user; send it again after Retry-After",
    ),
    (
        431,
        "HeadersTooLarge",
        "The headers are too large or too many; without a body",
    ),
    (500, "InternalError", "Something went wrong on our side"),
    (
        503,
        "Unavailable",
        "Temporarily unavailable or overloaded; send it again with the same key",
    ),
];

/// Adds headers and examples to the responses that an operation documents.
fn add_headers_and_examples(operation: &mut Operation, codes: &[Code]) {
    for (status, response) in &mut operation.responses.responses {
        if let (RefOr::T(response), Ok(status)) = (response, status.parse()) {
            add_headers_and_example(status, response, codes, operation.request_body.is_some());
        }
    }
}

fn add_headers_and_example(status: u16, response: &mut Response, codes: &[Code], has_body: bool) {
    let mut header = |name: &str, kind, description: &str| {
        let header = HeaderBuilder::new()
            .schema(Some(Object::with_type(SchemaType::Type(kind))))
            .description(Some(description))
            .build();
        response
            .headers
            .entry(name.to_owned())
            .or_insert(RefOr::<Header>::T(header));
    };
    header(
        "X-Request-Id",
        Type::String,
        "Identifies the request in logs; a well-formed id from the client is kept",
    );
    if matches!(status, 429 | 503) {
        header(
            "Retry-After",
            Type::Integer,
            "Send the request again after this many seconds",
        );
    }
    if let Some(RefOr::T(content)) = response.content.get_mut(CONTENT_TYPE) {
        content
            .example
            .get_or_insert_with(|| example(status, codes, has_body));
    }
}

fn problem_content() -> utoipa::openapi::Content {
    ContentBuilder::new()
        .schema(Some(Ref::from_schema_name("Problem")))
        .build()
}

/// A validation error that every operation can return.
fn unknown(has_body: bool) -> FieldError {
    let (pointer, detail) = match has_body {
        true => ("/colour", "unknown field"),
        false => ("colour", "unknown parameter"),
    };
    FieldError {
        pointer: pointer.to_owned(),
        detail: detail.to_owned(),
    }
}

fn example(status: u16, codes: &[Code], has_body: bool) -> serde_json::Value {
    let general = [
        Code::MalformedJson,
        Code::NotFound,
        Code::RequestTimeout,
        Code::BodyTooLarge,
        Code::UrlTooLong,
        Code::UnsupportedMediaType,
        Code::ValidationFailed,
        Code::RateLimited,
        Code::InternalError,
        Code::ServiceUnavailable,
    ];
    let code = codes
        .iter()
        .chain(&general)
        .find(|code| code.status().as_u16() == status)
        .copied()
        .unwrap_or(Code::RequestRefused);
    let problem = match code {
        Code::ValidationFailed => Problem::validation(vec![unknown(has_body)]),
        Code::ServiceUnavailable => Problem::new(code).outcome_unknown(),
        _ => Problem::new(code),
    };
    serde_json::to_value(problem.into_document(REQUEST_ID_EXAMPLE, Some("lamp")))
        .expect("a problem document is plain data")
}
