//! The tables and their named queries. No rules here.

pub mod order;
