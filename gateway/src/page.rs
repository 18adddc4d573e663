//! Serves the web page: the files of `gateway/web`, embedded in the binary.
//!
//! The code is our own, because the alternatives do not fit. For embedded files, `ServeDir` derives
//! the ETag from size and age instead of the content. Crates that embed and compress files need a
//! build step and have their own cache rules.

use std::borrow::Cow;
use std::collections::HashMap;
use std::io::Write as _;
use std::sync::LazyLock;

use axum::Router;
use axum::extract::Path;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use rust_embed::{Embed, EmbeddedFile};
use tower_http::set_header::SetResponseHeaderLayer;

/// The page may contact only this gateway and run only its own scripts. So a description of an
/// order can never run as code.
const CONTENT_SECURITY_POLICY: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; base-uri 'none'; \
     form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
);
const REFERRER_POLICY: HeaderValue = HeaderValue::from_static("no-referrer");
/// Browsers cache files but revalidate them each time, so a new gateway version shows its page at
/// once.
const CACHE_CONTROL: HeaderValue = HeaderValue::from_static("no-cache");
/// Number of digest bytes in an ETag.
const TAG_BYTES: usize = 12;

/// A debug build reads the folder at run time, so a change needs a restart of the gateway but no
/// build.
#[derive(Embed)]
#[folder = "web/"]
struct Files;

/// A file, ready to send.
struct Asset {
    content_type: HeaderValue,
    /// A weak ETag, because the plain and the compressed file share it.
    tag: HeaderValue,
    plain: Bytes,
    gzip: Bytes,
}

/// Read and compressed once, when the routes are created.
static ASSETS: LazyLock<HashMap<String, Asset>> = LazyLock::new(|| {
    let named = |path: Cow<'static, str>| {
        let asset = Asset::new(content_type(&path)?, Files::get(&path)?);
        Some((path.into_owned(), asset))
    };
    Files::iter().filter_map(named).collect()
});

pub(crate) fn routes() -> Router {
    LazyLock::force(&ASSETS);
    Router::new()
        .route(
            "/",
            get(async |headers: HeaderMap| respond("index.html", &headers)),
        )
        .route(
            "/assets/{*path}",
            get(async |Path(path): Path<String>, headers: HeaderMap| respond(&path, &headers)),
        )
        .layer(set(
            header::CONTENT_SECURITY_POLICY,
            CONTENT_SECURITY_POLICY,
        ))
        .layer(set(header::REFERRER_POLICY, REFERRER_POLICY))
}

fn set(name: HeaderName, value: HeaderValue) -> SetResponseHeaderLayer<HeaderValue> {
    SetResponseHeaderLayer::overriding(name, value)
}

/// `None` for files that are not served, such as a README.
fn content_type(path: &str) -> Option<HeaderValue> {
    Some(HeaderValue::from_static(match path.rsplit_once('.')?.1 {
        "html" => "text/html; charset=utf-8",
        "js" => "text/javascript; charset=utf-8",
        "css" => "text/css; charset=utf-8",
        "svg" => "image/svg+xml",
        _ => return None,
    }))
}

impl Asset {
    fn new(content_type: HeaderValue, file: EmbeddedFile) -> Self {
        let digest = file.metadata.sha256_hash();
        let digits: String = digest[..TAG_BYTES]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
        let gzip = encoder
            .write_all(&file.data)
            .and_then(|()| encoder.finish())
            .expect("writing to memory does not fail");
        Self {
            content_type,
            tag: HeaderValue::from_str(&format!("W/\"{digits}\""))
                .expect("hexadecimal digits are a header value"),
            plain: file.data.into_owned().into(),
            gzip: gzip.into(),
        }
    }
}

fn respond(path: &str, request: &HeaderMap) -> Response {
    let Some(asset) = ASSETS.get(path) else {
        return StatusCode::NOT_FOUND.into_response();
    };
    let headers = [
        (header::CONTENT_TYPE, asset.content_type.clone()),
        (header::ETAG, asset.tag.clone()),
        (header::CACHE_CONTROL, CACHE_CONTROL),
        (header::VARY, HeaderValue::from_static("accept-encoding")),
    ];
    let tag = asset.tag.to_str().unwrap_or_default();
    if list_header_contains(request, &header::IF_NONE_MATCH, tag) {
        (StatusCode::NOT_MODIFIED, headers).into_response()
    } else if list_header_contains(request, &header::ACCEPT_ENCODING, "gzip") {
        let encoding = [(header::CONTENT_ENCODING, "gzip")];
        (headers, encoding, asset.gzip.clone()).into_response()
    } else {
        (headers, asset.plain.clone()).into_response()
    }
}

/// Whether a comma-separated header contains `wanted` with a quality above 0.
fn list_header_contains(request: &HeaderMap, name: &HeaderName, wanted: &str) -> bool {
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
