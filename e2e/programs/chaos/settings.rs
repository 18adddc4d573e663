//! What a chaos run does.

use std::path::PathBuf;
use std::time::Duration;

/// After the last fault everything must be final within this.
pub(crate) const SETTLE_WITHIN: Duration = Duration::from_secs(60);

/// What to do.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// Decides everything that is decided here.
    pub(crate) seed: u64,
    /// How long customers come and things break.
    pub(crate) seconds: u64,
    /// Orders over that time.
    pub(crate) orders: u64,
    /// Deposits over that time.
    pub(crate) deposits: u64,
    /// Folder with the programs.
    pub(crate) binaries: PathBuf,
    /// More environment for the services.
    pub(crate) environment: Vec<(String, String)>,
    /// Where the history goes.
    pub(crate) history: Option<PathBuf>,
    /// Only these faults, by name; all if there are none.
    pub(crate) only: Vec<String>,
}

impl Settings {
    /// The usual load for so many seconds.
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
