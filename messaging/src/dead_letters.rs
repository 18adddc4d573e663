//! Messages that were not applied and wait for a person, with the real cause.
//!
//! *Poison* could not be handled: undecodable, of an unknown version, refused by the database every
//! time. *Quarantine* could be, but contradicts what is already decided.

pub(crate) mod replay;
pub(crate) mod table;
pub(crate) mod view;
