//! The web page: the files of `gateway/web`, in the binary. A debug build reads them from the source folder instead, so
//! that a change shows without building.

use std::io::Write as _;

use axum::Router;
use axum::body::Body;
use axum::extract::Path;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use flate2::Compression;
use flate2::write::GzEncoder;
use rust_embed::{Embed, EmbeddedFile};

/// The page asks nobody but this gateway, and runs no script but ours: what an order's description holds stays text.
const CONTENT_SECURITY_POLICY: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; base-uri 'none'; \
     form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
);
/// Kept, but asked about each time: a new gateway is a new page.
const CACHE_CONTROL: HeaderValue = HeaderValue::from_static("no-cache");
const REFERRER_POLICY: HeaderValue = HeaderValue::from_static("no-referrer");
/// Bytes of the digest that make an entity tag.
const TAG_BYTES: usize = 12;

#[derive(Embed)]
#[folder = "web/"]
struct Files;

pub(crate) fn routes() -> Router {
    Router::new()
        .route(
            "/",
            get(async |headers: HeaderMap| file("index.html", &headers)),
        )
        .route(
            "/assets/{*path}",
            get(async |Path(path): Path<String>, headers: HeaderMap| file(&path, &headers)),
        )
}

fn file(path: &str, request: &HeaderMap) -> Response {
    let found = content_type(path).and_then(|content_type| Some((content_type, Files::get(path)?)));
    let Some((content_type, file)) = found else {
        return StatusCode::NOT_FOUND.into_response();
    };
    let tag = tag(&file);
    let mut response = if lists(request, &header::IF_NONE_MATCH, &tag) {
        StatusCode::NOT_MODIFIED.into_response()
    } else {
        whole(file, request)
    };
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(header::CONTENT_SECURITY_POLICY, CONTENT_SECURITY_POLICY);
    headers.insert(header::REFERRER_POLICY, REFERRER_POLICY);
    headers.insert(header::CACHE_CONTROL, CACHE_CONTROL);
    headers.insert(header::VARY, HeaderValue::from_static("accept-encoding"));
    headers.insert(
        header::ETAG,
        HeaderValue::from_str(&tag).expect("hexadecimal digits are a header value"),
    );
    response
}

/// What is of none of these kinds is not part of the page, although it may lie in its folder.
fn content_type(path: &str) -> Option<&'static str> {
    match path.rsplit_once('.')?.1 {
        "html" => Some("text/html; charset=utf-8"),
        "js" => Some("text/javascript; charset=utf-8"),
        "css" => Some("text/css; charset=utf-8"),
        "svg" => Some("image/svg+xml"),
        _ => None,
    }
}

/// Weak, because the same file goes out compressed and as it is.
fn tag(file: &EmbeddedFile) -> String {
    let digest = file.metadata.sha256_hash();
    let digits: String = digest[..TAG_BYTES]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("W/\"{digits}\"")
}

fn whole(file: EmbeddedFile, request: &HeaderMap) -> Response {
    if !lists(request, &header::ACCEPT_ENCODING, "gzip") {
        return Body::from(file.data.into_owned()).into_response();
    }
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    let compressed = encoder
        .write_all(&file.data)
        .and_then(|()| encoder.finish())
        .expect("writing to memory does not fail");
    ([(header::CONTENT_ENCODING, "gzip")], compressed).into_response()
}

/// Whether a header with a list in it holds `wanted`. What has the quality 0 is not wanted.
fn lists(request: &HeaderMap, name: &header::HeaderName, wanted: &str) -> bool {
    let values = request
        .get_all(name)
        .into_iter()
        .filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|item| {
        let (item, quality) = item.split_once(";q=").unwrap_or((item, "1"));
        item.trim() == wanted
            && quality
                .trim()
                .parse()
                .is_ok_and(|quality: f32| quality > 0.0)
    })
}
