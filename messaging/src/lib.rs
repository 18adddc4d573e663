#![doc = include_str!("../README.md")]
#![warn(missing_docs)]

pub mod broker;
pub mod config;
pub mod consumer;
pub mod db;
pub mod dead_letter;
pub mod desk;
pub mod inbox;
mod incoming;
pub mod losses;
pub mod measure;
pub mod migration;
pub mod outbox;
pub mod outlet;
mod publish;
pub mod relay;
pub mod retention;
mod schedule;
pub mod timeline;
pub mod topology;
mod vital;

pub use vital::Vital;
