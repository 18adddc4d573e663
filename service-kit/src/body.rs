//! Reading bodies: within limits, and JSON strictly, naming everything that is wrong with it at once.

use std::fmt;
use std::time::Duration;

use axum::body::{Body, HttpBody as _};
use axum::extract::{FromRequest, Request};
use axum::http::{StatusCode, header};
use bytes::Bytes;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;
use uuid::Uuid;

use crate::http::{BODY_BYTES_MAX, foreign};
use crate::problem::{FieldError, Problem};

/// A body must be complete within this time. 16 KiB take less on any line.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// Reads a whole body, if it is small enough and does not take too long.
pub async fn read(body: Body) -> Result<Bytes, Problem> {
    read_within(BODY_TIMEOUT, body).await
}

async fn read_within(time: Duration, body: Body) -> Result<Bytes, Problem> {
    // Known before a byte of it has come.
    if body.size_hint().lower() > BODY_BYTES_MAX as u64 {
        return Err(foreign(StatusCode::PAYLOAD_TOO_LARGE));
    }
    match tokio::time::timeout(time, Limited::new(body, BODY_BYTES_MAX).collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(foreign(StatusCode::PAYLOAD_TOO_LARGE)),
        Ok(Err(_)) => {
            let detail = "The body ended before it was complete, or is not framed as HTTP asks. Send it again.";
            Err(Problem::new(StatusCode::BAD_REQUEST, "unreadable_body", detail))
        }
        Err(_) => {
            let detail = format!("The body was not complete within {time:?}. Send it again.");
            Err(Problem::new(StatusCode::REQUEST_TIMEOUT, "request_timeout", detail))
        }
    }
}

/// The fields of a JSON object. Each is taken once; [`Fields::finish`] refuses what is left over.
#[derive(Debug)]
pub struct Fields {
    fields: Vec<(String, Value)>,
    errors: Vec<FieldError>,
    source: Source,
}

#[derive(Clone, Copy, Debug)]
enum Source {
    Body,
    Query,
}

impl Fields {
    /// Reads a body. Text that is no JSON is a 400, JSON that is no object a 422.
    pub fn parse(body: &[u8]) -> Result<Self, Problem> {
        let value: Json = serde_json::from_slice(body).map_err(|error| {
            Problem::new(
                StatusCode::BAD_REQUEST,
                "malformed_json",
                format!("The body is not JSON: {error}. Send one JSON object."),
            )
        })?;
        let Json::Object(fields) = value else {
            return Err(Problem::validation(vec![Source::Body.error("", "must be a JSON object")]));
        };
        Ok(Self::new(fields, Source::Body))
    }

    /// The parameters of a URL, all of them strings. A mistyped filter must not look like no filter.
    pub fn from_query(query: &[(String, String)]) -> Self {
        Self::new(query.iter().map(|(name, value)| (name.clone(), Value::from(value.as_str()))).collect(), Source::Query)
    }

    fn new(fields: Vec<(String, Value)>, source: Source) -> Self {
        let mut read = Self { fields, errors: Vec::new(), source };
        for (index, (name, _)) in read.fields.iter().enumerate() {
            if read.fields[..index].iter().any(|(earlier, _)| earlier == name) {
                read.errors.push(source.error(name, "stands twice"));
            }
        }
        read
    }

    /// A field that must be there.
    pub fn required<T>(&mut self, name: &str, read: impl FnOnce(&Value) -> Result<T, String>) -> Option<T> {
        match self.take(name) {
            Some(value) => self.read(name, &value, read),
            None => {
                self.errors.push(self.source.error(name, "is missing"));
                None
            }
        }
    }

    /// A field that may be absent.
    pub fn optional<T>(&mut self, name: &str, absent: T, read: impl FnOnce(&Value) -> Result<T, String>) -> Option<T> {
        match self.take(name) {
            Some(value) => self.read(name, &value, read),
            None => Some(absent),
        }
    }

    /// Refuses fields that nobody took, and tells everything that was wrong.
    pub fn finish(mut self) -> Result<(), Problem> {
        for (name, _) in &self.fields {
            self.errors.push(self.source.error(name, "is not known here"));
        }
        if self.errors.is_empty() { Ok(()) } else { Err(Problem::validation(self.errors)) }
    }

    fn take(&mut self, name: &str) -> Option<Value> {
        let place = self.fields.iter().position(|(field, _)| field == name)?;
        let (_, value) = self.fields.swap_remove(place);
        // A field that stands twice was noted while parsing; do not also call the second one unknown.
        self.fields.retain(|(field, _)| field != name);
        Some(value)
    }

    fn read<T>(&mut self, name: &str, value: &Value, read: impl FnOnce(&Value) -> Result<T, String>) -> Option<T> {
        read(value).map_err(|detail| self.errors.push(self.source.error(name, &detail))).ok()
    }
}

impl Source {
    /// The wrong part: a JSON pointer (RFC 6901) into a body, the name of a parameter of a query.
    fn error(self, name: &str, detail: &str) -> FieldError {
        let pointer = match self {
            Self::Body if name.is_empty() => String::new(),
            Self::Body => format!("/{}", name.replace('~', "~0").replace('/', "~1")),
            Self::Query => name.to_owned(),
        };
        FieldError { pointer, detail: detail.to_owned() }
    }
}

/// The value must be a string.
pub fn text(value: &Value) -> Result<&str, String> {
    value.as_str().ok_or_else(|| "must be a string".to_owned())
}

/// Entries of a list in one answer, if the client does not say.
pub const LIMIT_DEFAULT: usize = 20;
const LIMIT_MAX: u64 = 100;

/// A parameter that is a number in this range.
pub fn number(value: &Value, range: std::ops::RangeInclusive<u64>) -> Result<u64, String> {
    let rule = || format!("must be an integer from {} to {}", range.start(), range.end());
    text(value)?.parse().ok().filter(|number| range.contains(number)).ok_or_else(rule)
}

/// The parameter `limit` of a list.
pub fn limit(value: &Value) -> Result<usize, String> {
    number(value, 1..=LIMIT_MAX).map(|number| usize::try_from(number).unwrap_or(LIMIT_DEFAULT))
}

/// The parameter `cursor` of a list whose pages end with an id.
pub fn cursor(value: &Value) -> Result<Option<Uuid>, String> {
    Uuid::parse_str(text(value)?).map(Some).map_err(|_| "must be the next_cursor of a page".to_owned())
}

/// A parameter that is set or not.
pub fn switch(value: &Value) -> Result<bool, String> {
    match text(value)? {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => Err("must be true or false".to_owned()),
    }
}

/// The value must be written as an integer: no fraction, no exponent, no quotes.
pub fn integer(value: &Value, otherwise: &str) -> Result<i64, String> {
    value.as_i64().ok_or_else(|| otherwise.to_owned())
}

impl<S: Send + Sync> FromRequest<S> for Fields {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        let content_type = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let essence = content_type.split(';').next().unwrap_or_default().trim();
        if !essence.eq_ignore_ascii_case("application/json") {
            return Err(Problem::new(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "unsupported_media_type",
                "Send the body as JSON, with the header Content-Type: application/json.",
            ));
        }
        Self::parse(&read(request.into_body()).await?)
    }
}

/// JSON whose outermost object keeps repeated names, so that they can be refused.
enum Json {
    Object(Vec<(String, Value)>),
    Other,
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct JsonVisitor;

        impl<'de> Visitor<'de> for JsonVisitor {
            type Value = Json;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON value")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Json, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(Json::Object(fields))
            }

            fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut seq: A) -> Result<Json, A::Error> {
                while seq.next_element::<serde::de::IgnoredAny>()?.is_some() {}
                Ok(Json::Other)
            }

            fn visit_bool<E>(self, _: bool) -> Result<Json, E> {
                Ok(Json::Other)
            }

            fn visit_i64<E>(self, _: i64) -> Result<Json, E> {
                Ok(Json::Other)
            }

            fn visit_u64<E>(self, _: u64) -> Result<Json, E> {
                Ok(Json::Other)
            }

            fn visit_f64<E>(self, _: f64) -> Result<Json, E> {
                Ok(Json::Other)
            }

            fn visit_str<E>(self, _: &str) -> Result<Json, E> {
                Ok(Json::Other)
            }

            fn visit_unit<E>(self) -> Result<Json, E> {
                Ok(Json::Other)
            }
        }

        deserializer.deserialize_any(JsonVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pointers(problem: Problem) -> Vec<String> {
        problem.into_document("id").errors.into_iter().map(|error| error.pointer).collect()
    }

    #[test]
    fn everything_that_is_wrong_is_named_at_once() {
        let mut fields = Fields::parse(br#"{"amount": 1.5, "surprise": 1, "user_id": 7, "a/b": 1}"#).unwrap();
        assert_eq!(fields.required("user_id", |value| text(value).map(str::to_owned)), None);
        assert_eq!(fields.required("amount", |value| integer(value, "must be an integer")), None);
        assert_eq!(fields.required("missing", |value| text(value).map(str::to_owned)), None);
        assert_eq!(fields.optional("description", "none", |_| Ok("some")), Some("none"));
        let mut wrong = pointers(fields.finish().unwrap_err());
        wrong.sort();
        assert_eq!(wrong, ["/amount", "/a~1b", "/missing", "/surprise", "/user_id"]);
    }

    #[test]
    fn a_field_that_stands_twice_is_refused() {
        let mut fields = Fields::parse(br#"{"amount": 1, "amount": 2}"#).unwrap();
        assert!(fields.required("amount", |value| integer(value, "")).is_some());
        assert_eq!(pointers(fields.finish().unwrap_err()), ["/amount"]);
    }

    #[test]
    fn what_is_no_json_is_a_400_and_what_is_no_object_a_422() {
        for malformed in ["", "{", "{\"a\":}", "nope", "{} {}"] {
            assert_eq!(Fields::parse(malformed.as_bytes()).unwrap_err().status(), StatusCode::BAD_REQUEST, "{malformed}");
        }
        for other in ["[]", "[1,[2]]", "1", "-1", "1.5", "\"text\"", "null", "true"] {
            assert_eq!(Fields::parse(other.as_bytes()).unwrap_err().status(), StatusCode::UNPROCESSABLE_ENTITY, "{other}");
        }
    }

    #[tokio::test]
    async fn a_body_that_is_too_large_too_slow_or_cut_off_is_refused() {
        let code = async |body| {
            let refused = read_within(Duration::from_millis(10), body).await.unwrap_err();
            (refused.status().as_u16(), refused.into_document("id").code)
        };
        let chunks = |chunk: Result<Bytes, std::io::Error>, times| {
            Body::from_stream(futures_util::stream::iter((0..times).map(move |_| match &chunk {
                Ok(bytes) => Ok(bytes.clone()),
                Err(error) => Err(std::io::Error::from(error.kind())),
            })))
        };
        let too_large = (413, "body_too_large".to_owned());
        assert_eq!(code(Body::from(vec![b' '; BODY_BYTES_MAX + 1])).await, too_large);
        assert_eq!(code(chunks(Ok(Bytes::from_static(b"0123456789")), BODY_BYTES_MAX)).await, too_large, "no length announced");
        let cut_off = chunks(Err(std::io::ErrorKind::UnexpectedEof.into()), 1);
        assert_eq!(code(cut_off).await, (400, "unreadable_body".to_owned()));
        let silent = Body::from_stream(futures_util::stream::pending::<Result<Bytes, std::io::Error>>());
        assert_eq!(code(silent).await, (408, "request_timeout".to_owned()));
    }

    #[test]
    fn only_a_plain_integer_is_an_integer() {
        for bad in ["1.5", "1e3", "1.0", "\"1\"", "null", "99999999999999999999", "true"] {
            assert!(integer(&serde_json::from_str(bad).unwrap(), "no").is_err(), "{bad}");
        }
        assert_eq!(integer(&Value::from(-5), "no"), Ok(-5));
    }
}
