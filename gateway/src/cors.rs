//! CORS: the web pages of other origins that may use the API, none by default. [`CorsLayer`] does
//! the work. Only the validation of configured origins is our own: the layer accepts any text, and
//! an invalid origin would silently never match.

use std::str::FromStr;
use std::time::Duration;

use axum::Router;
use axum::http::{HeaderName, HeaderValue, Method, Uri, header};
use tower_http::cors::CorsLayer;

use service_kit::http::REQUEST_ID;
use service_kit::input::key::{IDEMPOTENCY_KEY, IDEMPOTENCY_REPLAYED};

/// How long browsers may cache the response to a preflight request.
const PREFLIGHT_MAX_AGE: Duration = Duration::from_secs(600);

/// Scheme, host and port of a web page, as a browser sends them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin(HeaderValue);

impl FromStr for Origin {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "{text:?} is not an origin: it must look like https://shop.example or http://localhost:3000"
            )
        };
        let uri: Uri = text.parse().map_err(|_| wrong())?;
        let plain = matches!(uri.scheme_str(), Some("http" | "https"))
            && uri
                .host()
                .is_some_and(|host| host == host.to_ascii_lowercase() && !host.contains('*'))
            && uri
                .authority()
                .is_some_and(|authority| !authority.as_str().contains('@'))
            && uri.path() == "/"
            && uri.query().is_none()
            && !text.ends_with('/');
        if !plain {
            return Err(wrong());
        }
        HeaderValue::from_str(text).map(Self).map_err(|_| wrong())
    }
}

/// Allows pages from `origins`, and no others, to read the responses of `router`.
pub(crate) fn allow(origins: &[Origin], router: Router) -> Router {
    if origins.is_empty() {
        return router;
    }
    let sent = [
        header::CONTENT_TYPE,
        IDEMPOTENCY_KEY,
        REQUEST_ID,
        HeaderName::from_static("last-event-id"),
        HeaderName::from_static("traceparent"),
        HeaderName::from_static("tracestate"),
    ];
    let layer = CorsLayer::new()
        .allow_origin(
            origins
                .iter()
                .map(|origin| origin.0.clone())
                .collect::<Vec<_>>(),
        )
        .allow_methods([Method::GET, Method::POST])
        .allow_headers(sent)
        .expose_headers([
            header::LOCATION,
            header::RETRY_AFTER,
            IDEMPOTENCY_REPLAYED,
            REQUEST_ID,
        ])
        .max_age(PREFLIGHT_MAX_AGE);
    router.layer(layer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_exact_origin_is_accepted() {
        for good in [
            "https://shop.example",
            "http://localhost:3000",
            "https://xn--e1afmkfd.example:8443",
        ] {
            assert!(good.parse::<Origin>().is_ok(), "{good}");
        }
        for bad in [
            "*",
            "",
            "null",
            "https://*.shop.example",
            "https://shop.example/",
            "https://shop.example/page",
            "shop.example",
            "ftp://x",
            "https://Shop.example",
            "https://a@b",
        ] {
            assert!(bad.parse::<Origin>().is_err(), "{bad}");
        }
    }
}
