//! The `Idempotency-Key` header: the client's name for one intent, so that a repetition is not done again.

use axum::Json;
use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse as _, Response};
use serde::Serialize;

use crate::problem::Problem;

/// Names one intent of a client; sent again, it is the same intent.
pub const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// `true` on an answer that was given before.
pub const IDEMPOTENCY_REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");
const LENGTH_MAX: usize = 255;

/// The key of a request; minted here if the client sent none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdempotencyKey(String);

impl IdempotencyKey {
    /// The bare key, without quotes.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The key that a request carries, if it carries one.
    pub fn find(headers: &HeaderMap) -> Result<Option<Self>, Problem> {
        let mut values = headers.get_all(IDEMPOTENCY_KEY).iter();
        let (value, another) = (values.next(), values.next());
        match (value, another) {
            (None, _) => Ok(None),
            (Some(_), Some(_)) => Err(malformed()),
            (Some(value), None) => value
                .to_str()
                .ok()
                .and_then(parse)
                .map(|key| Some(Self(key)))
                .ok_or_else(malformed),
        }
    }

    /// A new one, for a client that sent none.
    pub fn mint() -> Self {
        Self(uuid::Uuid::new_v4().to_string())
    }
}

/// Accepts the key bare, as everyone sends it, and quoted, as the IETF draft has it.
fn parse(text: &str) -> Option<String> {
    let text = text.trim();
    let key = match text.strip_prefix('"') {
        None => text.to_owned(),
        Some(quoted) => unquote(quoted.strip_suffix('"')?)?,
    };
    let printable = key.bytes().all(|byte| (b' '..=b'~').contains(&byte));
    // Answers name the key bare: sent back like that, it must be read as the same key. A quote in front would be taken for
    // quoting, and spaces around it are no part of a header's value.
    let same_when_bare = !key.starts_with('"') && key.trim() == key;
    ((1..=LENGTH_MAX).contains(&key.len()) && printable && same_when_bare).then_some(key)
}

fn unquote(inner: &str) -> Option<String> {
    let mut key = String::with_capacity(inner.len());
    let mut characters = inner.chars();
    while let Some(character) = characters.next() {
        match character {
            '\\' => key.push(
                characters
                    .next()
                    .filter(|escaped| matches!(escaped, '"' | '\\'))?,
            ),
            '"' => return None,
            plain => key.push(plain),
        }
    }
    Some(key)
}

fn malformed() -> Problem {
    Problem::new(
        StatusCode::BAD_REQUEST,
        "idempotency_key_malformed",
        format!(
            "Send one Idempotency-Key of 1 to {LENGTH_MAX} printable ASCII characters, bare or in double quotes; the key itself neither \
             begins with a double quote nor begins or ends with a space. A UUID is a good choice."
        ),
    )
}

/// Whether a request with a key did its work now or had done it before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Delivery {
    /// Now.
    First,
    /// Before; this is the first answer again.
    Replayed,
}

/// 201 with what was created, and whether it is a repetition of an earlier answer.
pub fn created(delivery: Delivery, body: impl Serialize) -> Response {
    let mut response = (StatusCode::CREATED, Json(body)).into_response();
    if delivery == Delivery::Replayed {
        response
            .headers_mut()
            .insert(IDEMPOTENCY_REPLAYED, HeaderValue::from_static("true"));
    }
    response
}

impl<S: Send + Sync> FromRequestParts<S> for IdempotencyKey {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        Ok(Self::find(&parts.headers)?.unwrap_or_else(Self::mint))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_may_be_bare_or_quoted() {
        for (text, key) in [
            ("abc", "abc"),
            ("\"abc\"", "abc"),
            ("  a b ", "a b"),
            (r#""a\"b\\c""#, r#"a"b\c"#),
            ("a\"b", "a\"b"),
        ] {
            assert_eq!(parse(text).as_deref(), Some(key), "{text}");
        }
        assert_eq!(parse(&"x".repeat(255)).unwrap().len(), 255);
    }

    #[test]
    fn a_malformed_key_is_refused() {
        for text in [
            "",
            "\"\"",
            "\"abc",
            "\"a\"b\"",
            "\"a\\n\"",
            "\"",
            "schlüssel",
            "a\tb",
            &"x".repeat(256),
        ] {
            assert_eq!(parse(text), None, "{text:?}");
        }
    }

    /// Every answer names keys bare. One that reads differently when it is sent back as it was named is another key, and
    /// its request is done twice.
    #[test]
    fn a_key_that_is_named_in_an_answer_is_the_same_key_when_it_is_sent_back() {
        for text in [r#""\"q9\"""#, "\" z\"", "\"z \"", "\" \""] {
            assert_eq!(parse(text), None, "{text:?}");
        }
        let letters = ['a', ' ', '"', '\\', '!', '~', '\t', 'ü'];
        let mut texts = vec![String::new()];
        let mut accepted = 0;
        for _ in 0..5 {
            texts = texts
                .iter()
                .flat_map(|text| letters.map(|letter| format!("{text}{letter}")))
                .collect();
            for text in texts
                .iter()
                .flat_map(|text| [text.clone(), format!("\"{text}\"")])
            {
                let Some(key) = parse(&text) else { continue };
                assert_eq!(parse(&key).as_ref(), Some(&key), "sent as {text:?}");
                accepted += 1;
            }
        }
        assert!(accepted > 5000, "only {accepted} were accepted");
    }
}
