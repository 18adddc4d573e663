//! Messages that were not applied and need an operator, with the real cause.
//!
//! *Poison* cannot be handled: it is undecodable, has an unknown version, or the database refuses
//! it every time. *Quarantine* contradicts an earlier decision.

pub(crate) mod replay;
pub(crate) mod table;
pub(crate) mod view;
