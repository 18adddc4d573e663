//! Extractors: what a request carries, checked before a handler sees it.

pub mod key;
