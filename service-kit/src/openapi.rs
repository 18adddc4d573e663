//! What every operation has in common in an OpenAPI document: the errors that any request can meet, an example for each,
//! and the headers of every answer. Handlers document only what is their own.

use axum::http::StatusCode;
use utoipa::openapi::header::HeaderBuilder;
use utoipa::openapi::path::Operation;
use utoipa::openapi::schema::{Object, SchemaType};
use utoipa::openapi::{
    ContentBuilder, Header, OpenApi, Ref, RefOr, Response, ResponseBuilder, Type,
};

use crate::http::foreign;
use crate::problem::{CONTENT_TYPE, FieldError, Problem};

/// Which problem an operation tells with a status, for its example: status, code, detail.
pub type Told = (u16, &'static str, &'static str);

const REQUEST_ID_EXAMPLE: &str = "01933f3c-7d5a-7b60-9d6f-3f0b4b1f2a11";

/// Adds to every operation what any request can meet. `limited`: also the answer to clients that send too much.
pub fn complete(document: &mut OpenApi, limited: bool, told: &[Told]) {
    // There is no login yet.
    document.security.get_or_insert_with(Vec::new);
    let mut used = Vec::new();
    for item in document.paths.paths.values_mut() {
        for (operation, has_body) in [(&mut item.get, false), (&mut item.post, true)] {
            let Some(operation) = operation else { continue };
            for (status, name, description) in COMMON {
                let concerns = match status {
                    408 | 413 | 415 => has_body,
                    429 => limited,
                    _ => true,
                };
                if concerns
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
            furnish(operation, told);
        }
    }
    let components = document.components.get_or_insert_with(Default::default);
    for (status, name, description) in used {
        let mut response = ResponseBuilder::new().description(description).build();
        response
            .content
            .insert(CONTENT_TYPE.to_owned(), RefOr::T(problem_content()));
        furnish_response(status, &mut response, told);
        components
            .responses
            .insert(name.to_owned(), RefOr::T(response));
    }
}

const COMMON: [(u16, &str, &str); 9] = [
    (400, "BadRequest", "The request is not understood"),
    (408, "RequestTimeout", "The body did not come in time"),
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
        "Too many requests from this address or for this user; try again after the time given",
    ),
    (
        431,
        "HeadersTooLarge",
        "The headers are too large or too many",
    ),
    (500, "InternalError", "Something is wrong on our side"),
    (
        503,
        "Unavailable",
        "Away or overloaded; try again, with the same key",
    ),
];

/// Headers and examples of the answers that an operation describes itself.
fn furnish(operation: &mut Operation, told: &[Told]) {
    for (status, response) in &mut operation.responses.responses {
        if let (RefOr::T(response), Ok(status)) = (response, status.parse()) {
            furnish_response(status, response, told);
        }
    }
}

fn furnish_response(status: u16, response: &mut Response, told: &[Told]) {
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
        "Names the request in logs; taken over from the request if it had one",
    );
    if matches!(status, 429 | 503) {
        header(
            "Retry-After",
            Type::Integer,
            "Seconds after which trying again makes sense",
        );
    }
    if let Some(RefOr::T(content)) = response.content.get_mut(CONTENT_TYPE) {
        content.example.get_or_insert_with(|| example(status, told));
    }
}

fn problem_content() -> utoipa::openapi::Content {
    ContentBuilder::new()
        .schema(Some(Ref::from_schema_name("Problem")))
        .build()
}

fn example(status: u16, told: &[Told]) -> serde_json::Value {
    let code = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let own = told.iter().find(|(other, _, _)| *other == status);
    let problem = match (own, status) {
        (Some((_, name, detail)), _) => Problem::new(code, name, *detail),
        (None, 400) => Problem::new(
            code,
            "malformed_json",
            "The body is not JSON: EOF while parsing an object at line 1 column 1. Send one JSON object.",
        ),
        (None, 408) => Problem::new(
            code,
            "request_timeout",
            "The body was not complete within 10s. Send it again.",
        ),
        (None, 415) => {
            let detail = "Send the body as JSON in UTF-8, not compressed, with the header Content-Type: application/json.";
            Problem::new(code, "unsupported_media_type", detail)
        }
        (None, 422) => {
            let detail = "must be an integer from 1 to 1000000000000, in minor units".to_owned();
            Problem::validation(vec![FieldError {
                pointer: "/amount".to_owned(),
                detail,
            }])
        }
        (None, 429) => Problem::new(
            code,
            "rate_limited",
            "Too many requests from your address. Nothing was done; send it again in 1 s.",
        ),
        (None, 503) => {
            Problem::unavailable("It is away for a moment. Send it again, with the same key.")
                .outcome_unknown("lamp")
        }
        (None, _) => foreign(code),
    };
    serde_json::to_value(problem.into_document(REQUEST_ID_EXAMPLE))
        .expect("a problem document is plain data")
}
