//! Extractors: they validate a request before a handler sees it.
//!
//! One struct describes a body or a query. It is both the schema and the validation: it derives
//! `Deserialize` and utoipa's `ToSchema` or `IntoParams`. Rules for such a struct:
//!
//! - The type of a field defines which values are valid. The error text is what the type's visitor
//!   expects, or the error of its `TryFrom`.
//! - An optional field is an `Option`. Null is not the same as absent: it is rejected.
//! - No `#[serde(flatten)]` and no `#[serde(default)]`.
//!
//! A rejection lists all invalid fields. Repeated and unknown fields are rejected too.

mod body;
mod fields;
pub mod key;
mod query;

pub use body::{BODY_BYTES_MAX, ValidatedJson, read};
pub use query::{Cursor, NoParameters, Number, PageLimit, PageQuery, ValidatedQuery};
