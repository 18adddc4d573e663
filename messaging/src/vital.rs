//! How a supervised loop is doing, for `/readyz?verbose`.

use std::fmt;
use std::future::{Ready, ready};
use std::sync::{Arc, RwLock};

/// A sign of life that a loop keeps up to date and a health page reads.
#[derive(Clone, Debug)]
pub struct Vital(Arc<RwLock<Result<(), String>>>);

impl Vital {
    /// Starts out bad, with `why`.
    pub fn starting(why: &str) -> Self {
        Self(Arc::new(RwLock::new(Err(why.to_owned()))))
    }

    /// All is well.
    pub fn good(&self) {
        self.set(Ok(()));
    }

    /// Something is away; the loop goes on trying. Says whether that is news, so that a log does not repeat itself.
    pub fn bad(&self, why: impl fmt::Display) -> bool {
        let why = Err(why.to_string());
        let news = self.read() != why;
        self.set(why);
        news
    }

    /// The newest word.
    pub fn read(&self) -> Result<(), String> {
        self.0
            .read()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .clone()
    }

    /// The newest word, for a health page that asks again and again.
    pub fn probe(&self) -> impl Fn() -> Ready<Result<(), String>> + Send + Sync + 'static {
        let vital = self.clone();
        move || ready(vital.read())
    }

    fn set(&self, state: Result<(), String>) {
        *self
            .0
            .write()
            .unwrap_or_else(|poisoned| poisoned.into_inner()) = state;
    }
}
