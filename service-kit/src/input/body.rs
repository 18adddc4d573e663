//! Request bodies: limits on size and time, and strict JSON.

use std::time::Duration;

use axum::body::{Body, HttpBody as _};
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderMap, header};
use bytes::Bytes;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use serde::de::DeserializeOwned;

use super::fields::Fields;
use crate::problem::{Code, Problem};

/// Maximum size of a request body.
pub const BODY_BYTES_MAX: usize = 16 * 1024;
/// Time limit for a whole body. Even slow lines transfer 16 KiB faster.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// Reads a whole body. Rejects more than [`BODY_BYTES_MAX`].
pub async fn read(body: Body) -> Result<Bytes, Problem> {
    read_within(BODY_TIMEOUT, body).await
}

async fn read_within(time: Duration, body: Body) -> Result<Bytes, Problem> {
    let too_large = || {
        let cause = format!("The body is larger than {BODY_BYTES_MAX} bytes.");
        Problem::new(Code::BodyTooLarge).because(cause)
    };
    // Rejects by Content-Length, before any byte of the body has arrived.
    if body.size_hint().lower() > BODY_BYTES_MAX as u64 {
        return Err(too_large());
    }
    match tokio::time::timeout(time, Limited::new(body, BODY_BYTES_MAX).collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(_)) => Err(Problem::new(Code::UnreadableBody)),
        Err(_) => {
            let cause = format!("The body was not complete within {time:?}.");
            Err(Problem::new(Code::RequestTimeout).because(cause))
        }
    }
}

/// Extracts a JSON body that is a valid `T`.
#[derive(Clone, Copy, Debug)]
pub struct ValidatedJson<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for ValidatedJson<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        if !is_plain_json(request.headers()) {
            return Err(Code::UnsupportedMediaType.into());
        }
        Fields::from_json(&read(request.into_body()).await?)?
            .read()
            .map(Self)
    }
}

/// Whether the body is uncompressed JSON in UTF-8. Anything else would be misread.
fn is_plain_json(headers: &HeaderMap) -> bool {
    let content_type = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let mut parts = content_type.split(';').map(str::trim);
    let is_json = parts
        .next()
        .is_some_and(|essence| essence.eq_ignore_ascii_case("application/json"));
    let in_utf8 = parts
        .filter_map(|parameter| parameter.split_once('='))
        .all(|(name, value)| {
            !name.eq_ignore_ascii_case("charset")
                || value.trim_matches('"').eq_ignore_ascii_case("utf-8")
        });
    let is_plain = headers
        .get_all(header::CONTENT_ENCODING)
        .iter()
        .all(|coding| coding.as_bytes().eq_ignore_ascii_case(b"identity"));
    is_json && in_utf8 && is_plain
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    struct Empty {}

    #[tokio::test]
    async fn a_body_with_another_charset_or_coding_is_rejected() {
        let read = async |content_type: &str, coding: Option<&str>| {
            let mut request = Request::post("/").header("content-type", content_type);
            if let Some(coding) = coding {
                request = request.header("content-encoding", coding);
            }
            match ValidatedJson::<Empty>::from_request(request.body(Body::from("{}")).unwrap(), &())
                .await
            {
                Ok(_) => 200,
                Err(problem) => problem.status().as_u16(),
            }
        };
        for good in [
            "application/json",
            "Application/JSON; charset=utf-8",
            "application/json;charset=\"UTF-8\"",
            "application/json; v=1",
        ] {
            assert_eq!(
                (read(good, None).await, read(good, Some("identity")).await),
                (200, 200),
                "{good}"
            );
        }
        for bad in [
            "application/json; charset=utf-16",
            "application/json; v=1; Charset=\"latin1\"",
            "text/json",
            "",
        ] {
            assert_eq!(read(bad, None).await, 415, "{bad}");
        }
        for coding in ["gzip", "br", "identity, gzip"] {
            assert_eq!(
                read("application/json", Some(coding)).await,
                415,
                "{coding}"
            );
        }
    }

    #[tokio::test]
    async fn a_body_that_is_too_large_too_slow_or_incomplete_is_rejected() {
        let code = async |body| {
            let refused = read_within(Duration::from_millis(10), body)
                .await
                .unwrap_err();
            (
                refused.status().as_u16(),
                refused.into_document("id", None).code,
            )
        };
        let chunks = |chunk: Result<Bytes, std::io::Error>, times| {
            Body::from_stream(futures_util::stream::iter((0..times).map(
                move |_| match &chunk {
                    Ok(bytes) => Ok(bytes.clone()),
                    Err(error) => Err(std::io::Error::from(error.kind())),
                },
            )))
        };
        let too_large = (413, Code::BodyTooLarge);
        assert_eq!(
            code(Body::from(vec![b' '; BODY_BYTES_MAX + 1])).await,
            too_large
        );
        assert_eq!(
            code(chunks(
                Ok(Bytes::from_static(b"0123456789")),
                BODY_BYTES_MAX
            ))
            .await,
            too_large,
            "without Content-Length"
        );
        let cut_off = chunks(Err(std::io::ErrorKind::UnexpectedEof.into()), 1);
        assert_eq!(code(cut_off).await, (400, Code::UnreadableBody));
        let silent =
            Body::from_stream(futures_util::stream::pending::<Result<Bytes, std::io::Error>>());
        assert_eq!(code(silent).await, (408, Code::RequestTimeout));
    }
}
