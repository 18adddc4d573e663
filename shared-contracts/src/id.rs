//! Ids as separate types, so that one kind of id cannot be used in place of another.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
        #[cfg_attr(feature = "schema", schemars(extend("pattern" = "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")))]
        pub struct $name(Uuid);

        impl $name {
            /// Creates a UUIDv7: newer ids sort after older ones, so indexes grow at their end.
            pub fn mint() -> Self {
                Self(Uuid::now_v7())
            }

            /// The plain UUID, for databases.
            pub fn as_uuid(self) -> Uuid {
                self.0
            }
        }

        impl From<Uuid> for $name {
            fn from(id: Uuid) -> Self {
                Self(id)
            }
        }

        impl FromStr for $name {
            type Err = uuid::Error;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                Uuid::parse_str(text).map(Self)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

uuid_id! {
    OrderId
}
uuid_id! {
    /// Id of an event: created when the event is enqueued, and the same each time it is published.
    EventId
}

/// Id of a customer, chosen by the shop: 1 to 64 characters of `A-Z a-z 0-9 . _ -`. `.` and `..`
/// are not allowed, because URL paths give them another meaning.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(extend("pattern" = UserId::PATTERN, "maxLength" = UserId::LENGTH_MAX)))]
pub struct UserId(String);

/// The text is not a valid user id.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "must be 1 to 64 characters of A-Z, a-z, 0-9, '.', '_' or '-', and neither '.' nor '..' alone"
)]
pub struct InvalidUserId;

impl UserId {
    /// Maximum length in characters.
    pub const LENGTH_MAX: usize = 64;
    /// Regular expression for schemas. [`UserId::LENGTH_MAX`] limits the length.
    #[cfg(any(feature = "schema", feature = "openapi"))]
    const PATTERN: &str = r"^(\.?[A-Za-z0-9_-]|\.\.[A-Za-z0-9._-])[A-Za-z0-9._-]*$";

    /// Fails if `text` is not a valid user id.
    pub fn parse(text: impl Into<String>) -> Result<Self, InvalidUserId> {
        let text = text.into();
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        let path_segment = matches!(text.as_str(), "." | "..");
        if (1..=Self::LENGTH_MAX).contains(&text.len())
            && text.bytes().all(allowed)
            && !path_segment
        {
            Ok(Self(text))
        } else {
            Err(InvalidUserId)
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

#[cfg(feature = "openapi")]
impl utoipa::PartialSchema for UserId {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
        utoipa::openapi::ObjectBuilder::new()
            .schema_type(utoipa::openapi::Type::String)
            .max_length(Some(Self::LENGTH_MAX))
            .pattern(Some(Self::PATTERN))
            .into()
    }
}

#[cfg(feature = "openapi")]
impl utoipa::ToSchema for UserId {}

impl TryFrom<String> for UserId {
    type Error = InvalidUserId;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        Self::parse(text)
    }
}

impl From<UserId> for String {
    fn from(id: UserId) -> Self {
        id.0
    }
}

impl fmt::Display for UserId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_id_has_1_to_64_plain_characters() {
        for good in ["a", "alice", "a.b_c-D9", "...", ".a", "a.", &"x".repeat(64)] {
            assert_eq!(UserId::parse(good).unwrap().as_str(), good);
        }
        for bad in [
            "",
            ".",
            "..",
            "a b",
            "a/b",
            "ä",
            "a\0b",
            "a\n",
            &"x".repeat(65),
        ] {
            assert_eq!(UserId::parse(bad), Err(InvalidUserId), "{bad:?}");
        }
    }

    #[test]
    fn newer_ids_sort_after_older_ones() {
        let ids: Vec<_> = (0..1000).map(|_| OrderId::mint()).collect();
        assert!(ids.is_sorted());
    }
}
