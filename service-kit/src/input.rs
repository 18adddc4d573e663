//! Extractors: what a request carries, checked before a handler sees it.
//!
//! A body or a query is one struct, which is its schema and its validation. It derives `Deserialize` and utoipa's
//! `ToSchema` or `IntoParams`. Its rules:
//!
//! - The type of a field states its rule: the text of an error is what the type's visitor expects, or the error of its
//!   `TryFrom`.
//! - A field that may be absent is an `Option`. Null is not absent: it is refused.
//! - No `#[serde(flatten)]` and no `#[serde(default)]`.
//!
//! All wrong fields are named at once; repeated and unknown fields are refused.

mod body;
mod fields;
pub mod key;
mod query;

pub use body::{BODY_BYTES_MAX, ValidatedJson, read};
pub use query::{Cursor, NoParameters, Number, PageLimit, PageQuery, ValidatedQuery};
