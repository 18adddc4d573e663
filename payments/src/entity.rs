//! The tables and their named queries. No rules here.

pub mod account;
pub mod payment;
pub mod transfer;
