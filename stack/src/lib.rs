//! Runs the whole system on one machine, as real processes: PostgreSQL, NATS, orders, payments and
//! gateway. Each can be started, stopped, killed, paused and wiped. `stack up`, tests, chaos and
//! benchmarks use it.
//!
//! Depends on the programs that it starts, not on their code.

mod control;
pub mod folder;
pub mod http;
pub mod nats;
pub mod ports;
pub mod postgres;
pub mod process;
mod proxies;
pub mod proxy;
pub mod seed;
mod supervisor;
mod system;
pub mod testing;
pub mod tools;

pub use control::{Request, ask};
pub use folder::StackFolder;
pub use proxies::Proxies;
pub use supervisor::{PartStatus, supervise};
pub use system::{NAMES, Options, Service, System};
pub use tools::Tools;
