//! The client's name for one request, so that a retry is not executed again. Free of HTTP: use cases import it.
//!
//! Parsing is by hand: the IETF draft wants the key quoted, most clients send it bare, and no crate reads both.

const LENGTH_MAX: usize = 255;

/// Names one intended request of a client: a retry carries the same key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdempotencyKey(String);

impl IdempotencyKey {
    /// Longest key, in characters.
    pub const LENGTH_MAX: usize = LENGTH_MAX;

    /// Accepts a key bare, as most clients send it, and quoted, as the IETF draft defines it.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let key = match text.strip_prefix('"') {
            None => text.to_owned(),
            Some(quoted) => unquote(quoted.strip_suffix('"')?)?,
        };
        let printable = key.bytes().all(|byte| (b' '..=b'~').contains(&byte));
        // Responses name the key bare, and sent back bare it must be read as the same key. A leading double quote
        // would start a quoted key, and spaces around a header value are not part of it.
        let same_when_bare = !key.starts_with('"') && key.trim() == key;
        ((1..=LENGTH_MAX).contains(&key.len()) && printable && same_when_bare).then_some(Self(key))
    }

    /// Mints a key for a request that has none.
    pub fn mint() -> Self {
        Self(uuid::Uuid::new_v4().to_string())
    }

    /// The bare key, without quotes.
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

/// Whether this request was executed now, or an earlier one with the same key was.
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

    /// Responses name keys bare. A key that is parsed differently when it is sent back would be another key, and its
    /// request would be executed twice.
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
