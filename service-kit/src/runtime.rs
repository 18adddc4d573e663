//! The runtime of a service.

use std::num::NonZero;
use std::thread::available_parallelism;

use tokio::runtime::Builder;

use crate::shutdown::Failure;

/// Overrides the number of worker threads.
const WORKER_THREADS: &str = "TOKIO_WORKER_THREADS";

/// Runs a service until it ends.
///
/// A service waits most of the time, for the broker and the database, which often run on the same
/// machine. Half of the cores are enough for it, and with fewer threads, fewer of them are woken
/// for an event.
pub fn run(
    service: impl Future<Output = Result<(), Failure>> + Send + 'static,
) -> Result<(), Failure> {
    let mut builder = Builder::new_multi_thread();
    if std::env::var_os(WORKER_THREADS).is_none() {
        let cores = available_parallelism().map_or(1, NonZero::get);
        builder.worker_threads((cores / 2).max(1));
    }
    let runtime = builder.enable_all().build()?;
    // Spawned, so that it runs on a worker thread. The main thread would have to be woken for each
    // event.
    runtime.block_on(runtime.spawn(service))?
}
