//! The whole system on one machine, as real processes: PostgreSQL, NATS, orders, payments and gateway, each to be
//! started, stopped, killed, paused and wiped. Used by `stack up`, tests, chaos and benchmarks.
//!
//! Depends on the programs that it starts, not on their code.

mod control;
mod edges;
pub mod http;
pub mod nats;
pub mod place;
pub mod ports;
pub mod postgres;
pub mod process;
pub mod proxy;
pub mod seed;
mod supervisor;
mod system;
pub mod testing;
pub mod tools;

pub use control::{Request, ask};
pub use edges::Edges;
pub use place::Place;
pub use supervisor::{PartStatus, supervise};
pub use system::{NAMES, Options, Service, System};
pub use tools::Tools;
