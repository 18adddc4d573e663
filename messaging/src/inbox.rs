//! Incoming messages: decoded, recorded, applied, acknowledged.

pub(crate) mod acks;
pub(crate) mod apply;
mod catch_up;
pub(crate) mod consumer;
pub(crate) mod deferred;
mod delivery;
pub(crate) mod message;
pub(crate) mod table;
