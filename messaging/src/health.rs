//! Health of a supervised loop, for `/readyz?verbose`.

use std::fmt;
use std::future::{Ready, ready};
use std::sync::{Arc, PoisonError, RwLock};

/// Written by the loop, read by the health check. Clones share one state.
#[derive(Clone, Debug)]
pub(crate) struct HealthStatus(Arc<RwLock<Result<(), String>>>);

impl Default for HealthStatus {
    fn default() -> Self {
        Self(Arc::new(RwLock::new(Err("starting".to_owned()))))
    }
}

impl HealthStatus {
    pub(crate) fn good(&self) {
        self.set(Ok(()));
    }

    /// Records a failure that is being retried. Returns whether `why` is new, so that it is logged
    /// once.
    pub(crate) fn bad(&self, why: impl fmt::Display) -> bool {
        let why = Err(why.to_string());
        let is_new = self.read() != why;
        self.set(why);
        is_new
    }

    pub(crate) fn read(&self) -> Result<(), String> {
        self.0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(crate) fn probe(&self) -> impl Fn() -> Ready<Result<(), String>> + Send + Sync + 'static {
        let status = self.clone();
        move || ready(status.read())
    }

    fn set(&self, state: Result<(), String>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = state;
    }
}
