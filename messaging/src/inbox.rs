//! Messages on their way in: read, recorded, applied, acknowledged.

pub(crate) mod apply;
pub(crate) mod consumer;
mod delivery;
pub(crate) mod message;
pub(crate) mod table;
