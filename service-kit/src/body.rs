//! Reading bodies: within limits, and JSON strictly, naming everything that is wrong with it at once.

use std::fmt;
use std::time::Duration;

use axum::body::{Body, HttpBody as _};
use axum::extract::{FromRequest, FromRequestParts, Query, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use bytes::Bytes;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::problem::{Code, FieldError, Problem};

/// Largest request body.
pub const BODY_BYTES_MAX: usize = 16 * 1024;

/// A body must be complete within this time. 16 KiB take less on any line.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// Reads a whole body, if it is small enough and does not take too long.
pub async fn read(body: Body) -> Result<Bytes, Problem> {
    read_within(BODY_TIMEOUT, body).await
}

async fn read_within(time: Duration, body: Body) -> Result<Bytes, Problem> {
    let too_large = || {
        let cause = format!("The body is larger than {BODY_BYTES_MAX} bytes.");
        Problem::new(Code::BodyTooLarge).because(cause)
    };
    // Known before a byte of it has come.
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

/// A name, and its value or what is wrong with it.
type Field = (String, Result<Value, &'static str>);

/// The fields of a JSON object. Each is taken once; [`Fields::finish`] refuses what is left over.
#[derive(Debug)]
pub struct Fields {
    fields: Vec<Field>,
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
        let malformed = |error| {
            Problem::new(Code::MalformedJson).because(format!("The body is not JSON: {error}."))
        };
        let whole: &RawValue = serde_json::from_slice(body).map_err(malformed)?;
        if !whole.get().starts_with('{') {
            let detail = "the body must be a JSON object".to_owned();
            return Err(Problem::validation(vec![FieldError {
                pointer: String::new(),
                detail,
            }]));
        }
        let Members(members) = serde_json::from_str(whole.get()).map_err(malformed)?;
        Ok(Self::new(
            members
                .into_iter()
                .map(|(name, raw)| (name, value(raw)))
                .collect(),
            Source::Body,
        ))
    }

    /// The parameters of a URL, all of them strings. A mistyped filter must not look like no filter.
    pub fn from_query(query: &[(String, String)]) -> Self {
        Self::new(
            query
                .iter()
                .map(|(name, value)| (name.clone(), Ok(Value::from(value.as_str()))))
                .collect(),
            Source::Query,
        )
    }

    fn new(fields: Vec<Field>, source: Source) -> Self {
        let mut read = Self {
            fields,
            errors: Vec::new(),
            source,
        };
        for (index, (name, _)) in read.fields.iter().enumerate() {
            if read.fields[..index]
                .iter()
                .any(|(earlier, _)| earlier == name)
            {
                read.errors.push(source.error(name, "stands twice"));
            }
        }
        read
    }

    /// A field that must be there.
    pub fn required<T>(
        &mut self,
        name: &str,
        read: impl FnOnce(&Value) -> Result<T, String>,
    ) -> Option<T> {
        match self.take(name) {
            Some(value) => self.read(name, value, read),
            None => {
                self.errors.push(self.source.error(name, "is missing"));
                None
            }
        }
    }

    /// A field that may be absent.
    pub fn optional<T>(
        &mut self,
        name: &str,
        absent: T,
        read: impl FnOnce(&Value) -> Result<T, String>,
    ) -> Option<T> {
        match self.take(name) {
            Some(value) => self.read(name, value, read),
            None => Some(absent),
        }
    }

    /// Refuses fields that nobody took, and tells everything that was wrong.
    pub fn finish(mut self) -> Result<(), Problem> {
        for (name, _) in &self.fields {
            self.errors
                .push(self.source.error(name, "is not known here"));
        }
        if self.errors.is_empty() {
            Ok(())
        } else {
            Err(Problem::validation(self.errors))
        }
    }

    fn take(&mut self, name: &str) -> Option<Result<Value, &'static str>> {
        let place = self.fields.iter().position(|(field, _)| field == name)?;
        let (_, value) = self.fields.swap_remove(place);
        // A field that stands twice was noted while parsing; do not also call the second one unknown.
        self.fields.retain(|(field, _)| field != name);
        Some(value)
    }

    fn read<T>(
        &mut self,
        name: &str,
        value: Result<Value, &'static str>,
        read: impl FnOnce(&Value) -> Result<T, String>,
    ) -> Option<T> {
        let read = value.map_err(str::to_owned).and_then(|value| read(&value));
        read.map_err(|detail| self.errors.push(self.source.error(name, &detail)))
            .ok()
    }
}

impl Source {
    /// The wrong part: a JSON pointer (RFC 6901) into a body, the name of a parameter of a query. What has no name is named
    /// in words, since a pointer alone would not be understood.
    fn error(self, name: &str, detail: &str) -> FieldError {
        let (pointer, detail) = match (self, name) {
            (Self::Body, "") => ("/".to_owned(), format!("the field \"\" {detail}")),
            (Self::Query, "") => (String::new(), format!("the parameter \"\" {detail}")),
            (Self::Body, name) => (
                format!("/{}", name.replace('~', "~0").replace('/', "~1")),
                detail.to_owned(),
            ),
            (Self::Query, name) => (name.to_owned(), detail.to_owned()),
        };
        FieldError { pointer, detail }
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
    let rule = || {
        format!(
            "must be an integer from {} to {}",
            range.start(),
            range.end()
        )
    };
    text(value)?
        .parse()
        .ok()
        .filter(|number| range.contains(number))
        .ok_or_else(rule)
}

/// The parameter `limit` of a list.
pub fn limit(value: &Value) -> Result<usize, String> {
    number(value, 1..=LIMIT_MAX).map(|number| usize::try_from(number).unwrap_or(LIMIT_DEFAULT))
}

/// The parameter `cursor` of a list whose pages end with an id.
pub fn cursor(value: &Value) -> Result<Option<Uuid>, String> {
    Uuid::parse_str(text(value)?)
        .map(Some)
        .map_err(|_| "must be the next_cursor of a page".to_owned())
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

/// Refuses every parameter, on a route that has none: what is mistyped must not look as if it were heard.
#[derive(Clone, Copy, Debug)]
pub struct NoParameters;

impl<S: Send + Sync> FromRequestParts<S> for NoParameters {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        let query = Query::<Vec<(String, String)>>::try_from_uri(&parts.uri)
            .map_err(|_| Problem::new(Code::BadRequest))?;
        Fields::from_query(&query).finish().map(|()| Self)
    }
}

impl<S: Send + Sync> FromRequest<S> for Fields {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        if !is_plain_json(request.headers()) {
            return Err(Problem::new(Code::UnsupportedMediaType));
        }
        Self::parse(&read(request.into_body()).await?)
    }
}

/// JSON is in UTF-8. What names another charset or a coding would be misread.
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

/// The value of a field. Not all that is JSON can be held.
fn value(raw: &RawValue) -> Result<Value, &'static str> {
    let error = match serde_json::from_str(raw.get()) {
        Ok(value) => return Ok(value),
        Err(error) => error.to_string(),
    };
    match raw.get().as_bytes() {
        // Beyond all numbers. The largest that there is, is not acceptable anywhere either, for the same reason.
        [b'-' | b'0'..=b'9', ..] => Ok(Value::from(f64::MAX)),
        [b'"', ..] => Err("must be Unicode text"),
        _ if error.starts_with("recursion limit") => Err("is nested too deeply"),
        _ => Err("holds a number or a text that cannot be read"),
    }
}

/// The members of an object as they are written. Repeated names are kept, so that they can be refused.
struct Members<'a>(Vec<(String, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Members<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MembersVisitor;

        impl<'de> Visitor<'de> for MembersVisitor {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members<'de>, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }

        deserializer.deserialize_map(MembersVisitor)
    }
}

#[cfg(test)]
mod tests {
    use axum::http::StatusCode;

    use super::*;

    fn pointers(problem: Problem) -> Vec<String> {
        problem
            .into_document("id", None)
            .errors
            .into_iter()
            .map(|error| error.pointer)
            .collect()
    }

    #[test]
    fn everything_that_is_wrong_is_named_at_once() {
        let mut fields =
            Fields::parse(br#"{"amount": 1.5, "surprise": 1, "user_id": 7, "a/b": 1}"#).unwrap();
        assert_eq!(
            fields.required("user_id", |value| text(value).map(str::to_owned)),
            None
        );
        assert_eq!(
            fields.required("amount", |value| integer(value, "must be an integer")),
            None
        );
        assert_eq!(
            fields.required("missing", |value| text(value).map(str::to_owned)),
            None
        );
        assert_eq!(
            fields.optional("description", "none", |_| Ok("some")),
            Some("none")
        );
        let mut wrong = pointers(fields.finish().unwrap_err());
        wrong.sort();
        assert_eq!(
            wrong,
            ["/amount", "/a~1b", "/missing", "/surprise", "/user_id"]
        );
    }

    #[test]
    fn a_field_that_stands_twice_is_refused() {
        let mut fields = Fields::parse(br#"{"amount": 1, "amount": 2}"#).unwrap();
        assert!(
            fields
                .required("amount", |value| integer(value, ""))
                .is_some()
        );
        assert_eq!(pointers(fields.finish().unwrap_err()), ["/amount"]);
    }

    #[test]
    fn what_is_no_json_is_a_400_and_what_is_no_object_a_422() {
        for malformed in ["", "{", "{\"a\":}", "nope", "{} {}"] {
            assert_eq!(
                Fields::parse(malformed.as_bytes()).unwrap_err().status(),
                StatusCode::BAD_REQUEST,
                "{malformed}"
            );
        }
        for other in [
            "[]", "[1,[2]]", "1", "-1", "1.5", "\"text\"", "null", "true",
        ] {
            assert_eq!(
                Fields::parse(other.as_bytes()).unwrap_err().status(),
                StatusCode::UNPROCESSABLE_ENTITY,
                "{other}"
            );
        }
    }

    #[test]
    fn json_that_is_beyond_all_bounds_is_json_and_the_field_is_named() {
        let nines = "9".repeat(401);
        for number in ["1e400", "-1e400", &nines] {
            let mut fields =
                Fields::parse(format!(r#"{{"user_id": "alice", "amount": {number}}}"#).as_bytes())
                    .unwrap();
            assert!(
                fields
                    .required("user_id", |value| text(value).map(str::to_owned))
                    .is_some()
            );
            assert_eq!(
                fields.required("amount", |value| integer(value, "must be an integer")),
                None
            );
            let document = fields.finish().unwrap_err().into_document("id", None);
            assert_eq!(
                (document.status, document.detail.as_str()),
                (
                    422,
                    "/amount must be an integer. Correct the parts that errors names, and send the request again."
                ),
                "{number}"
            );
            let alone = Fields::parse(number.as_bytes()).unwrap_err();
            assert_eq!(alone.status(), StatusCode::UNPROCESSABLE_ENTITY, "{number}");
            let inside = Fields::parse(format!(r#"{{"amount": [{number}]}}"#).as_bytes())
                .unwrap()
                .finish()
                .unwrap_err();
            assert_eq!(pointers(inside), ["/amount"], "{number}");
        }
        let deep = format!("{}{}", "[".repeat(200), "]".repeat(200));
        let mut fields =
            Fields::parse(format!(r#"{{"amount": {deep}, "user_id": "\ud800"}}"#).as_bytes())
                .unwrap();
        assert_eq!(
            fields.required("amount", |value| integer(value, "must be an integer")),
            None
        );
        assert_eq!(
            fields.required("user_id", |value| text(value).map(str::to_owned)),
            None
        );
        let document = fields.finish().unwrap_err().into_document("id", None);
        let errors: Vec<_> = document
            .errors
            .iter()
            .map(|error| (error.pointer.as_str(), error.detail.as_str()))
            .collect();
        assert_eq!(
            errors,
            [
                ("/amount", "is nested too deeply"),
                ("/user_id", "must be Unicode text")
            ]
        );
        assert_eq!(
            Fields::parse(deep.as_bytes()).unwrap_err().status(),
            StatusCode::UNPROCESSABLE_ENTITY
        );
    }

    #[test]
    fn a_field_or_parameter_without_a_name_is_not_mistaken_for_the_body() {
        let told = |fields: Fields| {
            let document = fields.finish().unwrap_err().into_document("id", None);
            (document.errors[0].pointer.clone(), document.detail)
        };
        let field = told(Fields::parse(br#"{"": 1}"#).unwrap());
        assert_eq!(
            field,
            (
                "/".to_owned(),
                "The field \"\" is not known here. Correct the parts that errors names, and send the request again.".to_owned()
            )
        );
        let twice = told(Fields::parse(br#"{"": 1, "": 2}"#).unwrap());
        assert_eq!(twice.0, "/");
        let parameter = told(Fields::from_query(&[(String::new(), "1".to_owned())]));
        assert_eq!(
            parameter,
            (
                String::new(),
                "The parameter \"\" is not known here. Correct the parts that errors names, and send the request again.".to_owned()
            )
        );
        let parameter = told(Fields::from_query(&[("/".to_owned(), "1".to_owned())]));
        assert_eq!(
            parameter,
            ("/".to_owned(), "/ is not known here. Correct the parts that errors names, and send the request again.".to_owned())
        );
        let body = Fields::parse(b"[]").unwrap_err().into_document("id", None);
        assert_eq!(
            (body.errors[0].pointer.as_str(), body.detail.as_str()),
            (
                "",
                "The body must be a JSON object. Correct the parts that errors names, and send the request again."
            )
        );
    }

    #[tokio::test]
    async fn a_body_in_another_coding_is_refused() {
        let read = async |content_type: &str, coding: Option<&str>| {
            let mut request = Request::post("/").header("content-type", content_type);
            if let Some(coding) = coding {
                request = request.header("content-encoding", coding);
            }
            match Fields::from_request(request.body(Body::from("{}")).unwrap(), &()).await {
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
    async fn a_body_that_is_too_large_too_slow_or_cut_off_is_refused() {
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
            "no length announced"
        );
        let cut_off = chunks(Err(std::io::ErrorKind::UnexpectedEof.into()), 1);
        assert_eq!(code(cut_off).await, (400, Code::UnreadableBody));
        let silent =
            Body::from_stream(futures_util::stream::pending::<Result<Bytes, std::io::Error>>());
        assert_eq!(code(silent).await, (408, Code::RequestTimeout));
    }

    #[test]
    fn only_a_plain_integer_is_an_integer() {
        for bad in [
            "1.5",
            "1e3",
            "1.0",
            "\"1\"",
            "null",
            "99999999999999999999",
            "true",
        ] {
            assert!(
                integer(&serde_json::from_str(bad).unwrap(), "no").is_err(),
                "{bad}"
            );
        }
        assert_eq!(integer(&Value::from(-5), "no"), Ok(-5));
    }
}
