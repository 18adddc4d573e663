//! The outermost layers of every HTTP server: request ids, problem documents, panics, access log.

use std::any::Any;
use std::time::Instant;

use axum::Router;
use axum::body::Body;
use axum::extract::{MatchedPath, Request};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse as _, Response};
use tower::ServiceBuilder;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::request_id::{
    MakeRequestId, PropagateRequestIdLayer, RequestId, SetRequestIdLayer,
};
use tower_http::set_header::SetResponseHeaderLayer;
use tracing::{Instrument as _, debug, error, info, info_span};

use crate::idempotency::IdempotencyKey;
use crate::input::key::{self, IDEMPOTENCY_KEY};
use crate::metrics;
use crate::problem::{self, Code, Problem};

/// Identifies a request in logs and problem documents. A well-formed id from the caller is kept.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Maximum length of path and query together.
const URL_BYTES_MAX: usize = 4 * 1024;
/// Not counted in the request metrics, since monitoring requests them all the time.
const PROBES: [&str; 3] = ["/livez", "/readyz", "/metrics"];
const REQUEST_ID_LENGTH_MAX: usize = 64;

/// Wraps `router` in the layers that every server has, and answers unknown paths and methods.
pub fn edge(router: Router) -> Router {
    layered(
        router
            .fallback(async || Problem::new(Code::NotFound))
            .method_not_allowed_fallback(async || Problem::new(Code::MethodNotAllowed)),
    )
}

pub(crate) fn layered(router: Router) -> Router {
    let layers = ServiceBuilder::new()
        .map_request(without_malformed_request_id)
        .layer(SetRequestIdLayer::new(REQUEST_ID, MintRequestId))
        .layer(PropagateRequestIdLayer::new(REQUEST_ID))
        // Browsers must not guess content types, and no cache may store responses about money.
        .layer(SetResponseHeaderLayer::overriding(
            header::X_CONTENT_TYPE_OPTIONS,
            HeaderValue::from_static("nosniff"),
        ))
        .layer(SetResponseHeaderLayer::if_not_present(
            header::CACHE_CONTROL,
            HeaderValue::from_static("no-store"),
        ))
        .layer(from_fn(answer))
        .layer(CatchPanicLayer::custom(panicked));
    router.layer(layers)
}

/// Logs and counts the request, gives a POST an idempotency key, and turns every error from an
/// inner layer into a problem document. One middleware, because all of this needs request and
/// response.
async fn answer(mut request: Request, next: Next) -> Response {
    let request_id = request
        .extensions()
        .get::<RequestId>()
        .and_then(|id| id.header_value().to_str().ok())
        .unwrap_or_default()
        .to_owned();
    let key = idempotency_key(&mut request);
    let method = request.method().clone();
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map_or_else(|| "(none)".to_owned(), |path| path.as_str().to_owned());
    let span =
        info_span!("request", request.id = request_id, http.method = %method, http.route = route);

    async move {
        let begun = Instant::now();
        let url_bytes = request
            .uri()
            .path_and_query()
            .map_or(0, |url| url.as_str().len());
        let response = if url_bytes > URL_BYTES_MAX {
            let cause = format!("Path and query are longer than {URL_BYTES_MAX} bytes.");
            Problem::new(Code::UrlTooLong)
                .because(cause)
                .into_response()
        } else {
            next.run(request).await
        };
        let (response, written) = as_problem_document(response, &request_id, key.as_ref(), &method);
        let (status, elapsed) = (response.status().as_u16(), begun.elapsed());
        if !PROBES.contains(&route.as_str()) {
            metrics::answered(method_label(&method), &route, status, elapsed);
        }
        let duration_ms = elapsed.as_millis() as u64;
        match written {
            // Not at level info: a log line per rejection would add to the load. A metric counts
            // them.
            Some(code) if !matches!(code, Code::Overloaded | Code::RateLimited) => info!(
                http.status = status,
                problem.code = code.as_str(),
                duration_ms,
                "Request answered with a problem"
            ),
            _ => debug!(http.status = status, duration_ms, "Request answered"),
        }
        response
    }
    .instrument(span)
    .await
}

/// The key of a POST. A request without a key gets a new one, so that the client can retry with it
/// if the outcome is unknown. The handler rejects a malformed key.
fn idempotency_key(request: &mut Request) -> Option<IdempotencyKey> {
    if request.method() != Method::POST {
        return None;
    }
    let found = key::find(request.headers()).ok()?;
    let key = found.unwrap_or_else(|| {
        let minted = IdempotencyKey::mint();
        let value = HeaderValue::from_str(minted.as_str()).expect("a UUID is a header value");
        request.headers_mut().insert(IDEMPOTENCY_KEY, value);
        minted
    });
    request.extensions_mut().insert(key.clone());
    Some(key)
}

/// Unknown methods share one label. Otherwise each invented method would create a new series.
fn method_label(method: &Method) -> &str {
    match method.as_str() {
        known @ ("GET" | "HEAD" | "POST" | "PUT" | "PATCH" | "DELETE" | "OPTIONS") => known,
        _ => "OTHER",
    }
}

fn without_malformed_request_id(mut request: Request) -> Request {
    let well_formed = |value: &HeaderValue| {
        let bytes = value.as_bytes();
        (1..=REQUEST_ID_LENGTH_MAX).contains(&bytes.len())
            && bytes
                .iter()
                .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'))
    };
    if !request.headers().get(REQUEST_ID).is_some_and(well_formed) {
        request.headers_mut().remove(REQUEST_ID);
    }
    request
}

#[derive(Clone, Copy)]
struct MintRequestId;

impl MakeRequestId for MintRequestId {
    fn make_request_id<B>(&mut self, _: &axum::http::Request<B>) -> Option<RequestId> {
        let id = uuid::Uuid::now_v7().to_string();
        HeaderValue::from_str(&id).ok().map(RequestId::new)
    }
}

/// Writes the document of a problem and returns its code, for the log. Returns no code for a
/// document that was only forwarded: the service that created it has logged it.
fn as_problem_document(
    mut response: Response,
    request_id: &str,
    key: Option<&IdempotencyKey>,
    method: &Method,
) -> (Response, Option<Code>) {
    let status = response.status();
    let problem = match response.extensions_mut().remove::<Problem>() {
        Some(problem) => problem,
        None if status.is_success() || status.is_redirection() || status.is_informational() => {
            return (response, None);
        }
        None if has_problem_document(response.headers()) => return (response, None),
        None => Problem::from_status(status),
    };
    let code = problem.code();
    let document = problem.into_document(request_id, key.map(IdempotencyKey::as_str));
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
    (response, Some(code))
}

fn has_problem_document(headers: &HeaderMap) -> bool {
    headers.get(header::CONTENT_TYPE).is_some_and(|value| {
        value
            .as_bytes()
            .starts_with(problem::CONTENT_TYPE.as_bytes())
    })
}

/// Answers 500 with an unknown outcome: the handler of a POST may have committed before it
/// panicked.
fn panicked(panic: Box<dyn Any + Send>) -> Response {
    let words = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    error!(
        panic = words.unwrap_or("(no message)"),
        "A request handler panicked"
    );
    Problem::new(Code::InternalError)
        .outcome_unknown()
        .into_response()
}

#[cfg(test)]
mod tests {
    use axum::http::StatusCode;
    use axum::routing::{any, get, post};
    use http_body_util::BodyExt as _;
    use serde_json::Value;
    use tower::ServiceExt as _;

    use super::*;
    use crate::input::{BODY_BYTES_MAX, ValidatedJson};

    #[derive(serde::Deserialize)]
    struct Empty {}

    async fn answered(request: Request) -> (StatusCode, HeaderMap, Value) {
        let router = Router::new()
            .route(
                "/panic",
                any(async || -> StatusCode { panic!("secret internals") }),
            )
            .route("/bare", get(async || StatusCode::IM_A_TEAPOT))
            .route("/echo", post(async |_: ValidatedJson<Empty>| "ok"));
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
    async fn the_answer_after_a_panic_contains_the_key_to_retry_with() {
        let panics = |request: axum::http::request::Builder| {
            request.uri("/panic").body(Body::empty()).unwrap()
        };
        let (status, _, document) = answered(panics(
            Request::post("/").header("idempotency-key", "\"the key\""),
        ))
        .await;
        assert_eq!(status, 500);
        assert_eq!(
            (&document["outcome"], &document["idempotency_key"]),
            (&"unknown".into(), &"the key".into()),
            "{document}"
        );
        assert!(!document.to_string().contains("internals"), "{document}");
        let (_, _, document) = answered(panics(
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
            let (answered, headers, document) = answered(request).await;
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
            assert!(!document.to_string().contains("internals"), "{what}");
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
    async fn a_well_formed_request_id_is_kept_and_any_other_is_replaced() {
        let with_id = |id: &str| {
            Request::get("/nowhere")
                .header(REQUEST_ID, id)
                .body(Body::empty())
                .unwrap()
        };
        assert_eq!(
            answered(with_id("abc-1.2_3")).await.2["request_id"],
            "abc-1.2_3"
        );
        for malformed in ["a b", "x".repeat(65).as_str(), "", "<script>"] {
            assert_ne!(
                answered(with_id(malformed)).await.2["request_id"],
                malformed
            );
        }
    }
}
