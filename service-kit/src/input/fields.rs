//! Deserializes fields into a struct and reports all invalid fields.
//!
//! Plain serde stops at the first error. Here the struct is deserialized again without the invalid
//! field, until no further invalid field is found. So a valid input takes one pass, and each
//! invalid field takes one more. Validation crates do not help: they check values only after serde
//! has accepted all types.

use std::fmt::{self, Display};

use serde::de::value::{MapDeserializer, SeqDeserializer};
use serde::de::{
    self, Deserialize, DeserializeOwned, DeserializeSeed, Deserializer, Expected, IntoDeserializer,
    MapAccess, Unexpected, Visitor,
};
use serde::forward_to_deserialize_any;
use serde_json::Value;
use serde_json::value::RawValue;

use crate::problem::{Code, FieldError, Problem};

/// A name, and its value or the reason why it cannot be read.
type Field = (String, Result<Value, &'static str>);

#[derive(Clone, Copy, Debug)]
enum Source {
    Body,
    Query,
}

#[derive(Debug)]
pub(super) struct Fields {
    fields: Vec<Field>,
    source: Source,
    /// The field names of the target struct.
    known: &'static [&'static str],
    wrong: Vec<(&'static str, Wrong)>,
}

impl Fields {
    /// Rejects text that is not JSON with 400, and JSON that is not an object with 422.
    pub(super) fn from_json(body: &[u8]) -> Result<Self, Problem> {
        let malformed = |error| {
            Problem::new(Code::MalformedJson).because(format!("The body is not JSON: {error}."))
        };
        let whole: &RawValue = serde_json::from_slice(body).map_err(malformed)?;
        if !whole.get().starts_with('{') {
            return Err(Problem::validation(vec![FieldError {
                pointer: String::new(),
                detail: "the body must be a JSON object".to_owned(),
            }]));
        }
        let Members(members) = serde_json::from_str(whole.get()).map_err(malformed)?;
        let fields = members.into_iter().map(|(name, raw)| (name, value(raw)));
        Ok(Self::new(Source::Body, fields.collect()))
    }

    pub(super) fn from_query(parameters: Vec<(String, String)>) -> Self {
        let fields = parameters
            .into_iter()
            .map(|(name, text)| (name, Ok(Value::from(text))));
        Self::new(Source::Query, fields.collect())
    }

    fn new(source: Source, fields: Vec<Field>) -> Self {
        Self {
            fields,
            source,
            known: &[],
            wrong: Vec::new(),
        }
    }

    pub(super) fn read<T: DeserializeOwned>(mut self) -> Result<T, Problem> {
        let read = loop {
            let before = self.wrong.len();
            match T::deserialize(&mut self) {
                Err(_) if self.wrong.len() > before => {}
                read => break read,
            }
        };
        let mut errors = self.repeated();
        errors.extend(
            self.wrong
                .iter()
                .map(|(name, Wrong(detail))| self.source.error(name, detail)),
        );
        errors.extend(self.unknown());
        match read {
            Ok(read) if errors.is_empty() => Ok(read),
            // Each field is valid, but not their combination.
            Err(Wrong(detail)) if errors.is_empty() => Err(Problem::validation(vec![FieldError {
                pointer: String::new(),
                detail,
            }])),
            _ => Err(Problem::validation(errors)),
        }
    }

    fn repeated(&self) -> Vec<FieldError> {
        let is_second = |index: usize, name: &String| {
            self.fields[..index]
                .iter()
                .filter(|(earlier, _)| earlier == name)
                .count()
                == 1
        };
        let repeated = self.fields.iter().enumerate();
        repeated
            .filter(|(index, (name, _))| is_second(*index, name))
            .map(|(_, (name, _))| self.source.error(name, "is given more than once"))
            .collect()
    }

    fn unknown(&self) -> impl Iterator<Item = FieldError> {
        let what = match self.source {
            Source::Body => "unknown field",
            Source::Query => "unknown parameter",
        };
        self.fields
            .iter()
            .filter(|(name, _)| !self.known.contains(&name.as_str()))
            .map(move |(name, _)| self.source.error(name, what))
    }
}

impl Source {
    /// The pointer is a JSON pointer (RFC 6901) for a body, and the parameter's name for a query.
    fn error(self, name: &str, detail: &str) -> FieldError {
        let pointer = match self {
            Self::Body => format!("/{}", name.replace('~', "~0").replace('/', "~1")),
            Self::Query => name.to_owned(),
        };
        // Shows an empty name: without it, the error would seem to be about the whole body.
        let detail = match name {
            "" => format!("{detail} \"\""),
            _ => detail.to_owned(),
        };
        FieldError { pointer, detail }
    }
}

/// Presents all fields of the struct in declaration order, including absent ones, but not those
/// already known to be invalid.
impl<'de> Deserializer<'de> for &mut Fields {
    type Error = Wrong;

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        known: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Wrong> {
        self.known = known;
        visitor.visit_map(Entries {
            left: known.iter(),
            current: "",
            fields: self,
        })
    }

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Wrong> {
        Err(de::Error::custom(
            "only a struct with named fields can be read",
        ))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf option unit unit_struct newtype_struct
        seq tuple tuple_struct map enum identifier ignored_any
    }
}

struct Entries<'a> {
    fields: &'a mut Fields,
    left: std::slice::Iter<'static, &'static str>,
    current: &'static str,
}

impl<'de> MapAccess<'de> for Entries<'_> {
    type Error = Wrong;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Wrong> {
        let wrong = &self.fields.wrong;
        let is_wrong = |name: &str| wrong.iter().any(|(other, _)| *other == name);
        match self.left.find(|name| !is_wrong(name)) {
            None => Ok(None),
            Some(name) => {
                self.current = name;
                seed.deserialize((*name).into_deserializer()).map(Some)
            }
        }
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Wrong> {
        let found = self
            .fields
            .fields
            .iter()
            .find(|(name, _)| name == self.current);
        let source = self.fields.source;
        let read = match found {
            None => seed.deserialize(Absent),
            Some((_, Err(detail))) => Err(Wrong((*detail).to_owned())),
            Some((_, Ok(value))) => seed.deserialize(Given(value.clone(), source)),
        };
        read.map_err(|wrong| {
            self.fields.wrong.push((self.current, wrong));
            Wrong(String::new())
        })
    }
}

/// An absent field: only an `Option` accepts it.
struct Absent;

impl<'de> Deserializer<'de> for Absent {
    type Error = Wrong;

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Wrong> {
        visitor.visit_none()
    }

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Wrong> {
        Err(Wrong("is missing".to_owned()))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf unit unit_struct newtype_struct
        seq tuple tuple_struct map struct enum identifier ignored_any
    }
}

/// A field's value. In a query, numbers and booleans are given as text.
struct Given(Value, Source);

impl<'de> Deserializer<'de> for Given {
    type Error = Wrong;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Wrong> {
        let Self(value, source) = self;
        match value {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(value),
            Value::String(text) => visitor.visit_string(text),
            Value::Number(number) => match (number.as_u64(), number.as_i64(), number.as_f64()) {
                (Some(number), _, _) => visitor.visit_u64(number),
                (_, Some(number), _) => visitor.visit_i64(number),
                (_, _, number) => visitor.visit_f64(number.unwrap_or(f64::MAX)),
            },
            Value::Array(items) => {
                let items = items.into_iter().map(|item| Self(item, source));
                visitor.visit_seq(SeqDeserializer::new(items))
            }
            Value::Object(members) => {
                let members = members
                    .into_iter()
                    .map(|(name, value)| (name, Self(value, source)));
                visitor.visit_map(MapDeserializer::new(members))
            }
        }
    }

    fn deserialize_u64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Wrong> {
        match &self {
            Self(Value::String(text), Source::Query) => match text.parse() {
                Ok(number) => visitor.visit_u64(number),
                Err(_) => Err(de::Error::invalid_value(Unexpected::Str(text), &visitor)),
            },
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Wrong> {
        match &self {
            Self(Value::String(text), Source::Query) => match text.as_str() {
                "true" => visitor.visit_bool(true),
                "false" => visitor.visit_bool(false),
                _ => Err(Wrong("must be true or false".to_owned())),
            },
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Wrong> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Wrong> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Wrong> {
        match self.0 {
            Value::String(text) => {
                let name: de::value::StringDeserializer<Wrong> = text.into_deserializer();
                visitor.visit_enum(name)
            }
            _ => Err(de::Error::unknown_variant("", variants)),
        }
    }

    forward_to_deserialize_any! {
        i8 i16 i32 i64 u8 u16 u32 f32 f64 char str string bytes byte_buf unit unit_struct
        seq tuple tuple_struct map struct identifier ignored_any
    }
}

impl<'de> IntoDeserializer<'de, Wrong> for Given {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

/// An error text that says what a field must be.
#[derive(Debug)]
pub(super) struct Wrong(String);

impl Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Wrong {}

impl de::Error for Wrong {
    fn custom<T: Display>(detail: T) -> Self {
        Self(detail.to_string())
    }

    fn invalid_type(_: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self(format!("must be {expected}"))
    }

    fn invalid_value(_: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self(format!("must be {expected}"))
    }

    fn unknown_variant(_: &str, variants: &'static [&'static str]) -> Self {
        Self(match variants {
            [first @ .., last] if !first.is_empty() => {
                format!("must be {} or {last}", first.join(", "))
            }
            variants => format!("must be {}", variants.join(", ")),
        })
    }
}

/// Parses a field's value. Some JSON does not fit into a [`Value`]; the error then names the field.
fn value(raw: &RawValue) -> Result<Value, &'static str> {
    let error = match serde_json::from_str(raw.get()) {
        Ok(value) => return Ok(value),
        Err(error) => error.to_string(),
    };
    match raw.get().as_bytes() {
        // The number is larger than any f64. The largest f64 is out of every range too, so the
        // error states the field's own range.
        [b'-' | b'0'..=b'9', ..] => Ok(Value::from(f64::MAX)),
        [b'"', ..] => Err("must be Unicode text"),
        _ if error.starts_with("recursion limit") => Err("is nested too deeply"),
        _ => Err("contains a number or text that cannot be read"),
    }
}

/// The members of a JSON object, including repeated names, so that these can be rejected.
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
    use serde::Deserialize;

    use super::*;
    use crate::input::{Number, PageLimit};

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(rename_all = "UPPERCASE")]
    enum Colour {
        Red,
        Green,
        Blue,
    }

    #[derive(Debug, Deserialize)]
    struct Lamp {
        name: String,
        watts: Number<1, 100>,
        colour: Option<Colour>,
        tags: Option<std::collections::BTreeMap<String, Vec<i32>>>,
    }

    #[derive(Debug, Deserialize)]
    struct Filter {
        limit: Option<PageLimit>,
        lit: Option<bool>,
        name: Option<String>,
    }

    fn lamp(body: &str) -> Result<Lamp, Problem> {
        Fields::from_json(body.as_bytes())?.read()
    }

    fn filter(query: &[(&str, &str)]) -> Result<Filter, Problem> {
        let owned = |(name, text): &(&str, &str)| ((*name).to_owned(), (*text).to_owned());
        Fields::from_query(query.iter().map(owned).collect()).read()
    }

    fn errors(problem: Problem) -> Vec<(String, String)> {
        let document = problem.into_document("id", None);
        document
            .errors
            .into_iter()
            .map(|error| (error.pointer, error.detail))
            .collect()
    }

    fn owned(errors: &[(&str, &str)]) -> Vec<(String, String)> {
        errors
            .iter()
            .map(|(pointer, detail)| ((*pointer).to_owned(), (*detail).to_owned()))
            .collect()
    }

    #[test]
    fn a_valid_body_is_read() {
        let read =
            lamp(r#"{"watts": 40, "tags": {"a": [1, 2]}, "name": "x", "colour": "BLUE"}"#).unwrap();
        assert_eq!((read.name.as_str(), read.watts.get()), ("x", 40));
        assert_eq!(read.colour, Some(Colour::Blue));
        assert_eq!(read.tags.unwrap()["a"], [1, 2]);
        let read = lamp(r#"{"name": "x", "watts": 100}"#).unwrap();
        assert!(read.colour.is_none() && read.tags.is_none());
    }

    #[test]
    fn all_invalid_fields_are_reported_at_once() {
        let wrong = lamp(
            r#"{"watts": 1.5, "surprise": 1, "name": 7, "a/b": 1, "colour": "PINK", "tags": {"a": 1}}"#,
        );
        assert_eq!(
            errors(wrong.unwrap_err()),
            owned(&[
                ("/name", "must be a string"),
                ("/watts", "must be an integer from 1 to 100"),
                ("/colour", "must be RED, GREEN or BLUE"),
                ("/tags", "must be a sequence"),
                ("/surprise", "unknown field"),
                ("/a~1b", "unknown field"),
            ])
        );
        assert_eq!(
            errors(lamp("{}").unwrap_err()),
            owned(&[("/name", "is missing"), ("/watts", "is missing")])
        );
        assert_eq!(
            errors(lamp(r#"{"name": null, "watts": null, "colour": null}"#).unwrap_err()),
            owned(&[
                ("/name", "must be a string"),
                ("/watts", "must be an integer from 1 to 100"),
                ("/colour", "must be RED, GREEN or BLUE"),
            ])
        );
    }

    #[test]
    fn a_repeated_field_is_rejected() {
        let twice = lamp(r#"{"name": "a", "watts": 1, "name": "b", "name": "c"}"#);
        assert_eq!(
            errors(twice.unwrap_err()),
            owned(&[("/name", "is given more than once")])
        );
        let twice = filter(&[("limit", "1"), ("limit", "1")]);
        assert_eq!(
            errors(twice.unwrap_err()),
            owned(&[("limit", "is given more than once")])
        );
    }

    #[test]
    fn a_query_parameter_is_parsed_as_the_type_of_its_field() {
        let read = filter(&[("limit", "7"), ("lit", "true"), ("name", "1")]).unwrap();
        assert_eq!(PageLimit::or_default(read.limit), 7);
        assert_eq!((read.lit, read.name.as_deref()), (Some(true), Some("1")));
        assert_eq!(PageLimit::or_default(filter(&[]).unwrap().limit), 20);
        let wrong = filter(&[("limit", ""), ("lit", "yes"), ("Limit", "1")]);
        assert_eq!(
            errors(wrong.unwrap_err()),
            owned(&[
                ("limit", "must be an integer from 1 to 100"),
                ("lit", "must be true or false"),
                ("Limit", "unknown parameter"),
            ])
        );
        for bad in ["0", "101", "-1", "1.0", "1e1", " 1", "99999999999999999999"] {
            assert!(filter(&[("limit", bad)]).is_err(), "{bad}");
        }
    }

    #[test]
    fn text_that_is_not_json_gets_400_and_json_that_is_not_an_object_gets_422() {
        for malformed in ["", "{", "{\"a\":}", "nope", "{} {}"] {
            assert_eq!(
                lamp(malformed).unwrap_err().status(),
                StatusCode::BAD_REQUEST,
                "{malformed}"
            );
        }
        for other in [
            "[]", "[1,[2]]", "1", "-1", "1.5", "\"text\"", "null", "true",
        ] {
            let problem = lamp(other).unwrap_err();
            assert_eq!(
                problem.status(),
                StatusCode::UNPROCESSABLE_ENTITY,
                "{other}"
            );
            assert_eq!(
                errors(problem),
                owned(&[("", "the body must be a JSON object")])
            );
        }
    }

    #[test]
    fn a_huge_number_or_deep_nesting_is_reported_at_its_field() {
        let nines = "9".repeat(401);
        for number in ["1e400", "-1e400", &nines] {
            let problem = lamp(&format!(r#"{{"name": "x", "watts": {number}}}"#)).unwrap_err();
            assert_eq!(
                errors(problem),
                owned(&[("/watts", "must be an integer from 1 to 100")]),
                "{number}"
            );
            assert_eq!(
                lamp(number).unwrap_err().status(),
                StatusCode::UNPROCESSABLE_ENTITY,
                "{number}"
            );
        }
        let deep = format!("{}{}", "[".repeat(200), "]".repeat(200));
        let problem = lamp(&format!(
            r#"{{"watts": {deep}, "name": "\ud800", "a": {deep}}}"#
        ))
        .unwrap_err();
        assert_eq!(
            errors(problem),
            owned(&[
                ("/name", "must be Unicode text"),
                ("/watts", "is nested too deeply"),
                ("/a", "unknown field"),
            ])
        );
    }

    #[test]
    fn a_field_without_a_name_is_not_mistaken_for_the_body() {
        let wrong = lamp(r#"{"": 1, "name": "x", "watts": 1}"#).unwrap_err();
        assert_eq!(errors(wrong), owned(&[("/", "unknown field \"\"")]));
        let wrong = filter(&[("", "1")]).unwrap_err();
        assert_eq!(errors(wrong), owned(&[("", "unknown parameter \"\"")]));
    }
}
