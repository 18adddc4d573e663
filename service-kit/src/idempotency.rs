//! Idempotency keys: a client names a request, so that a retry is not executed again. No HTTP here,
//! because the use cases import this module.
//!
//! The parser is our own: the IETF draft requires quotes, most clients send the key without, and no
//! crate accepts both.

const LENGTH_MAX: usize = 255;

/// Identifies a request of a client. A retry has the same key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdempotencyKey(String);

impl IdempotencyKey {
    /// Maximum length, in characters.
    pub const LENGTH_MAX: usize = LENGTH_MAX;

    /// Accepts a key with or without double quotes.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let key = match text.strip_prefix('"') {
            None => text.to_owned(),
            Some(quoted) => unquote(quoted.strip_suffix('"')?)?,
        };
        let printable = key.bytes().all(|byte| (b' '..=b'~').contains(&byte));
        // Responses contain the key without quotes. If a client sends it back like that, it must be
        // parsed as the same key. A leading double quote would start a quoted key, and spaces
        // around a header value are not part of the value.
        let same_when_bare = !key.starts_with('"') && key.trim() == key;
        ((1..=LENGTH_MAX).contains(&key.len()) && printable && same_when_bare).then_some(Self(key))
    }

    /// Creates a random key, for a request that has none.
    pub fn mint() -> Self {
        Self(uuid::Uuid::new_v4().to_string())
    }

    /// The key without quotes.
    pub fn as_str(&self) -> &str {
        &self.0
    }
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

/// Whether the request was executed now, or earlier under the same key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Execution {
    First,
    Replayed,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Option<String> {
        IdempotencyKey::parse(text).map(|key| key.0)
    }

    #[test]
    fn a_key_may_have_double_quotes_or_none() {
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
    fn a_malformed_key_is_rejected() {
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

    /// Responses contain keys without quotes. If a key that is sent back were parsed differently,
    /// it would be a new key, and the request would be executed twice.
    #[test]
    fn a_key_from_a_response_is_parsed_as_the_same_key() {
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
