//! Query parameters.

use std::fmt;

use axum::extract::{FromRequestParts, Query};
use axum::http::request::Parts;
use serde::de::{DeserializeOwned, Error, Visitor};
use serde::{Deserialize, Deserializer};
use utoipa::openapi::{ObjectBuilder, RefOr, Schema, Type};
use utoipa::{IntoParams, PartialSchema, ToSchema};
use uuid::Uuid;

use super::fields::Fields;
use crate::problem::{Code, Problem};

/// Extracts query parameters that are a valid `T`. Unknown parameters are rejected: otherwise a
/// misspelled one would look like an absent one.
#[derive(Clone, Copy, Debug)]
pub struct ValidatedQuery<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for ValidatedQuery<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        let Query(parameters) = Query::<Vec<(String, String)>>::try_from_uri(&parts.uri)
            .map_err(|_| Code::BadRequest)?;
        Fields::from_query(parameters).read().map(Self)
    }
}

/// Rejects every query parameter.
#[derive(Clone, Copy, Debug)]
pub struct NoParameters;

#[derive(Deserialize)]
struct Nothing {}

impl<S: Send + Sync> FromRequestParts<S> for NoParameters {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let ValidatedQuery(Nothing {}) = ValidatedQuery::from_request_parts(parts, state).await?;
        Ok(Self)
    }
}

/// An integer in a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Number<const MIN: u64, const MAX: u64>(u64);

impl<const MIN: u64, const MAX: u64> Number<MIN, MAX> {
    pub fn get(self) -> u64 {
        self.0
    }
}

impl<'de, const MIN: u64, const MAX: u64> Deserialize<'de> for Number<MIN, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct NumberVisitor<const MIN: u64, const MAX: u64>;

        impl<const MIN: u64, const MAX: u64> Visitor<'_> for NumberVisitor<MIN, MAX> {
            type Value = Number<MIN, MAX>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "an integer from {MIN} to {MAX}")
            }

            fn visit_u64<E: Error>(self, number: u64) -> Result<Self::Value, E> {
                if !(MIN..=MAX).contains(&number) {
                    return Err(E::invalid_value(
                        serde::de::Unexpected::Unsigned(number),
                        &self,
                    ));
                }
                Ok(Number(number))
            }
        }

        deserializer.deserialize_u64(NumberVisitor)
    }
}

impl<const MIN: u64, const MAX: u64> PartialSchema for Number<MIN, MAX> {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new()
            .schema_type(Type::Integer)
            .minimum(Some(MIN))
            .maximum(Some(MAX))
            .into()
    }
}

impl<const MIN: u64, const MAX: u64> ToSchema for Number<MIN, MAX> {}

/// Selects a page of a list. The cursors are ids of entries.
#[derive(Clone, Copy, Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct PageQuery {
    /// Maximum number of entries on the page
    #[param(inline, nullable = false)]
    pub limit: Option<PageLimit>,
    /// The next_cursor of the previous page
    #[param(inline, nullable = false)]
    pub cursor: Option<Cursor>,
}

/// Maximum number of entries on a page.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct PageLimit(Number<1, 100>);

impl PageLimit {
    const DEFAULT: usize = 20;

    pub fn or_default(limit: Option<Self>) -> usize {
        limit.map_or(Self::DEFAULT, |Self(limit)| limit.get() as usize)
    }
}

impl PartialSchema for PageLimit {
    fn schema() -> RefOr<Schema> {
        let mut schema = Number::<1, 100>::schema();
        if let RefOr::T(Schema::Object(object)) = &mut schema {
            object.default = Some(Self::DEFAULT.into());
        }
        schema
    }
}

impl ToSchema for PageLimit {}

/// The `next_cursor` of a page: the id of its last entry.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(try_from = "String")]
pub struct Cursor(Uuid);

impl Cursor {
    pub fn id(self) -> Uuid {
        self.0
    }
}

impl TryFrom<String> for Cursor {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        Uuid::parse_str(&text)
            .map(Self)
            .map_err(|_| "must be the next_cursor of a page")
    }
}

impl PartialSchema for Cursor {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new()
            .schema_type(Type::String)
            .pattern(Some("^[0-9a-f]{32}$"))
            .into()
    }
}

impl ToSchema for Cursor {}
