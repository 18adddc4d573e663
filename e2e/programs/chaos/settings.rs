//! The settings of a chaos run.

use std::path::PathBuf;
use std::time::Duration;

/// After the last fault everything must be final within this.
pub(crate) const SETTLE_WITHIN: Duration = Duration::from_secs(60);

#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// Determines the schedule of faults and requests.
    pub(crate) seed: u64,
    /// Duration of the load and the faults.
    pub(crate) seconds: u64,
    pub(crate) orders: u64,
    pub(crate) deposits: u64,
    /// The folder with the programs.
    pub(crate) binaries: PathBuf,
    /// Additional environment of the services.
    pub(crate) environment: Vec<(String, String)>,
    /// The file for the history.
    pub(crate) history: Option<PathBuf>,
    /// Only faults whose name contains one of these; all if empty.
    pub(crate) only: Vec<String>,
}

impl Settings {
    pub(crate) fn new(seed: u64, seconds: u64, binaries: PathBuf) -> Self {
        Self {
            seed,
            seconds,
            orders: seconds * 28,
            deposits: seconds * 3,
            binaries,
            environment: Vec::new(),
            history: None,
            only: Vec::new(),
        }
    }
}
