//! The outermost layer of every HTTP server: request ids, problem documents, panics, access log.

use std::panic::AssertUnwindSafe;
use std::time::Instant;

use axum::Router;
use axum::body::Body;
use axum::extract::{MatchedPath, Request};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse as _, Response};
use futures_util::FutureExt as _;
use tracing::{Instrument as _, debug, error, info, info_span};

use crate::idempotency::IdempotencyKey;
use crate::metrics;
use crate::problem::{self, Problem};

/// Names a request in logs and problem documents; taken over from the caller if it is reasonable.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Largest request body.
pub const BODY_BYTES_MAX: usize = 16 * 1024;
/// Largest request line and headers together.
pub const HEAD_BYTES_MAX: usize = 16 * 1024;
/// Longest path and query.
const URL_BYTES_MAX: usize = 4 * 1024;
/// Asked by machines all the time; counting them tells nothing.
const PROBES: [&str; 3] = ["/livez", "/readyz", "/metrics"];
const REQUEST_ID_LENGTH_MAX: usize = 64;

/// Wraps `router` in what every server has.
pub fn edge(router: Router) -> Router {
    router
        .fallback(async || foreign(StatusCode::NOT_FOUND))
        .method_not_allowed_fallback(async || foreign(StatusCode::METHOD_NOT_ALLOWED))
        .layer(from_fn(catch))
        .layer(from_fn(finish))
}

/// Gives the request an id and turns whatever error came out, from whichever layer, into a problem document.
async fn finish(mut request: Request, next: Next) -> Response {
    let request_id = request_id(request.headers());
    request.headers_mut().insert(REQUEST_ID, request_id.clone());
    let method = request.method().clone();
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map_or_else(|| "(none)".to_owned(), |path| path.as_str().to_owned());
    let id_text = request_id.to_str().unwrap_or_default().to_owned();
    let span =
        info_span!("request", request.id = id_text, http.method = %method, http.route = route);

    async move {
        let begun = Instant::now();
        let url_bytes = request
            .uri()
            .path_and_query()
            .map_or(0, |url| url.as_str().len());
        let response = match url_bytes {
            0..=URL_BYTES_MAX => next.run(request).await,
            _ => foreign(StatusCode::URI_TOO_LONG).into_response(),
        };
        let (mut response, told) = as_problem_document(response, &id_text, &method);
        response.headers_mut().insert(REQUEST_ID, request_id);
        protect(response.headers_mut(), &route);
        if !PROBES.contains(&route.as_str()) {
            metrics::answered(
                method_label(&method),
                &route,
                response.status().as_u16(),
                begun.elapsed(),
            );
        }
        let (status, duration_ms) = (
            response.status().as_u16(),
            begun.elapsed().as_millis() as u64,
        );
        match told {
            // Its cause was logged where it was handled, if there is more to say than this.
            Some(Told { code, sheds: false }) => {
                info!(
                    http.status = status,
                    problem.code = code,
                    duration_ms,
                    "Request answered with a problem"
                );
            }
            _ => debug!(http.status = status, duration_ms, "Request answered"),
        }
        response
    }
    .instrument(span)
    .await
}

/// Browsers must not guess what an answer is, and nobody keeps copies of what is about money.
fn protect(headers: &mut HeaderMap, route: &str) {
    headers.insert(
        header::X_CONTENT_TYPE_OPTIONS,
        HeaderValue::from_static("nosniff"),
    );
    if route.starts_with("/v1/") {
        headers
            .entry(header::CACHE_CONTROL)
            .or_insert(HeaderValue::from_static("no-store"));
    }
}

/// A client may invent methods; they are one to us.
fn method_label(method: &Method) -> &str {
    match method.as_str() {
        known @ ("GET" | "HEAD" | "POST" | "PUT" | "PATCH" | "DELETE" | "OPTIONS") => known,
        _ => "OTHER",
    }
}

fn request_id(headers: &HeaderMap) -> HeaderValue {
    let reasonable = |value: &&HeaderValue| {
        let bytes = value.as_bytes();
        (1..=REQUEST_ID_LENGTH_MAX).contains(&bytes.len())
            && bytes
                .iter()
                .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'))
    };
    match headers.get(REQUEST_ID).filter(reasonable) {
        Some(value) => value.clone(),
        None => HeaderValue::from_str(&uuid::Uuid::now_v7().to_string())
            .expect("a UUID is a header value"),
    }
}

/// A problem document was written here, with a request id that somebody may come back with. One that is only handed on is in
/// the log of whoever wrote it.
struct Told {
    code: &'static str,
    /// What is turned away because there is too much of it must not fill the log as well; it is counted.
    sheds: bool,
}

fn as_problem_document(
    mut response: Response,
    request_id: &str,
    method: &Method,
) -> (Response, Option<Told>) {
    let status = response.status();
    let problem = match response.extensions_mut().remove::<Problem>() {
        Some(problem) => problem,
        None if status.is_success() || status.is_redirection() || status.is_informational() => {
            return (response, None);
        }
        None if has_problem_document(response.headers()) => return (response, None),
        None => foreign(status),
    };
    let told = Told {
        code: problem.code(),
        sheds: problem.sheds(),
    };
    let document = problem.into_document(request_id);
    let bytes = serde_json::to_vec(&document).expect("a problem document is plain data");
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static(problem::CONTENT_TYPE),
    );
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(bytes.len()));
    *response.body_mut() = if method == Method::HEAD {
        Body::empty()
    } else {
        Body::from(bytes)
    };
    (response, Some(told))
}

fn has_problem_document(headers: &HeaderMap) -> bool {
    headers.get(header::CONTENT_TYPE).is_some_and(|value| {
        value
            .as_bytes()
            .starts_with(problem::CONTENT_TYPE.as_bytes())
    })
}

/// An error from a layer that does not know of problem documents.
pub(crate) fn foreign(status: StatusCode) -> Problem {
    match status {
        StatusCode::NOT_FOUND => Problem::new(
            status,
            "not_found",
            "There is nothing at this path. See /openapi.json.",
        ),
        StatusCode::METHOD_NOT_ALLOWED => Problem::new(
            status,
            "method_not_allowed",
            "This path has no such method; the header Allow names those it has.",
        ),
        StatusCode::PAYLOAD_TOO_LARGE => Problem::new(
            status,
            "body_too_large",
            format!("The body is larger than {BODY_BYTES_MAX} bytes. Send less."),
        ),
        StatusCode::URI_TOO_LONG => Problem::new(
            status,
            "url_too_long",
            format!("Path and query are longer than {URL_BYTES_MAX} bytes. Send less."),
        ),
        StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE => {
            let detail = format!(
                "The headers are more than 100, or larger than {HEAD_BYTES_MAX} bytes. Send less."
            );
            Problem::new(status, "headers_too_large", detail)
        }
        StatusCode::BAD_REQUEST => Problem::new(
            status,
            "bad_request",
            "The request is not understood. Compare it with /openapi.json.",
        ),
        _ if status.is_server_error() => Problem::new(
            status,
            "internal_error",
            "Something went wrong on our side. Try again.",
        ),
        _ => Problem::new(
            status,
            "request_refused",
            status
                .canonical_reason()
                .unwrap_or("The request was refused."),
        ),
    }
}

/// The key that a request came with is named if its handler panics. The gateway sends one with every POST.
async fn catch(request: Request, next: Next) -> Response {
    let key = (request.method() == Method::POST)
        .then(|| IdempotencyKey::find(request.headers()).ok().flatten())
        .flatten();
    unless_it_panics(key.as_ref(), next.run(request)).await
}

/// An answer, also if making it panics: then the request may or may not have been done, and its key tells.
pub async fn unless_it_panics(
    key: Option<&IdempotencyKey>,
    answer: impl Future<Output = Response>,
) -> Response {
    let panic = match AssertUnwindSafe(answer).catch_unwind().await {
        Ok(answer) => return answer,
        Err(panic) => panic,
    };
    let words = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    error!(
        panic = words.unwrap_or("(no message)"),
        "A request handler panicked"
    );
    let problem =
        |detail| Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", detail);
    match key {
        Some(key) => {
            problem("Something went wrong on our side. Try again with the key that is named here.")
                .outcome_unknown(key.as_str())
        }
        None => problem("Something went wrong on our side. Try again."),
    }
    .into_response()
}

#[cfg(test)]
mod tests {
    use axum::routing::{any, get, post};
    use http_body_util::BodyExt as _;
    use serde_json::Value;
    use tower::ServiceExt as _;

    use super::*;
    use crate::body::Fields;

    async fn answer(request: Request) -> (StatusCode, HeaderMap, Value) {
        let router = Router::new()
            .route(
                "/panic",
                any(async || -> StatusCode { panic!("secret innards") }),
            )
            .route("/bare", get(async || StatusCode::IM_A_TEAPOT))
            .route(
                "/echo",
                post(async |fields: Fields| format!("{}", fields.finish().is_ok())),
            );
        let response = edge(router).oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let bytes = body.collect().await.unwrap().to_bytes();
        (
            parts.status,
            parts.headers,
            serde_json::from_slice(&bytes).unwrap_or_default(),
        )
    }

    fn post_json(content_type: &str, body: impl Into<Body>) -> Request {
        Request::post("/echo")
            .header("content-type", content_type)
            .body(body.into())
            .unwrap()
    }

    #[tokio::test]
    async fn a_handler_that_panics_names_the_key_to_try_again_with() {
        let panics = |request: axum::http::request::Builder| {
            request.uri("/panic").body(Body::empty()).unwrap()
        };
        let (status, _, document) = answer(panics(
            Request::post("/").header("idempotency-key", "\"the key\""),
        ))
        .await;
        assert_eq!(status, 500);
        assert_eq!(
            (&document["outcome"], &document["idempotency_key"]),
            (&"unknown".into(), &"the key".into()),
            "{document}"
        );
        assert!(!document.to_string().contains("innards"), "{document}");
        let (_, _, document) = answer(panics(
            Request::get("/").header("idempotency-key", "the key"),
        ))
        .await;
        assert_eq!(
            (&document["outcome"], &document["idempotency_key"]),
            (&Value::Null, &Value::Null),
            "a GET has no outcome"
        );
    }

    #[tokio::test]
    async fn every_layer_answers_errors_as_problem_documents() {
        let get = |path: &str| Request::get(path).body(Body::empty()).unwrap();
        for (request, status, code) in [
            (get("/nowhere"), 404, "not_found"),
            (get("/echo"), 405, "method_not_allowed"),
            (get("/panic"), 500, "internal_error"),
            (get("/bare"), 418, "request_refused"),
            (
                get(&format!("/bare?{}", "x".repeat(5000))),
                414,
                "url_too_long",
            ),
            (post_json("text/plain", "{}"), 415, "unsupported_media_type"),
            (post_json("application/json", "{"), 400, "malformed_json"),
            (
                post_json("application/json", "[]"),
                422,
                "validation_failed",
            ),
            (
                post_json("application/json", vec![b' '; BODY_BYTES_MAX + 1]),
                413,
                "body_too_large",
            ),
        ] {
            let what = format!("{} {}", request.method(), request.uri());
            let (answered, headers, document) = answer(request).await;
            assert_eq!(answered.as_u16(), status, "{what}");
            assert_eq!(
                headers[header::CONTENT_TYPE],
                problem::CONTENT_TYPE,
                "{what}"
            );
            assert_eq!(document["code"], code, "{what}");
            assert_eq!(document["status"], status, "{what}");
            assert_eq!(headers[header::X_CONTENT_TYPE_OPTIONS], "nosniff", "{what}");
            assert_eq!(
                document["request_id"],
                headers[REQUEST_ID].to_str().unwrap(),
                "{what}"
            );
            assert!(!document.to_string().contains("innards"), "{what}");
            let title = document["title"].as_str().unwrap();
            assert!(!title.contains("json") && !title.contains("Url"), "{title}");
            assert!(
                document["detail"]
                    .as_str()
                    .unwrap()
                    .starts_with(|first: char| first.is_ascii_uppercase()),
                "{document}"
            );
        }
    }

    #[tokio::test]
    async fn a_reasonable_request_id_is_kept_and_another_is_replaced() {
        let with_id = |id: &str| {
            Request::get("/nowhere")
                .header(REQUEST_ID, id)
                .body(Body::empty())
                .unwrap()
        };
        assert_eq!(
            answer(with_id("abc-1.2_3")).await.2["request_id"],
            "abc-1.2_3"
        );
        for unreasonable in ["a b", "x".repeat(65).as_str(), "", "<script>"] {
            assert_ne!(
                answer(with_id(unreasonable)).await.2["request_id"],
                unreasonable
            );
        }
    }
}
