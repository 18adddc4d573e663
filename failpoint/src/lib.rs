//! Failpoints: named points in the code where a test makes the process crash, fail or freeze.
//!
//! A failpoint is active only in debug builds, and only if `GOZON_FAILPOINT` names it:
//! `relay.after_send=kill`. A release build does not even contain the names.

#![warn(missing_docs)]

use std::fmt;

mod guard;

#[cfg(debug_assertions)]
pub use guard::is_removed;
pub use guard::{GUARDS, REMOVED_GUARD, is_guard};

/// Every failpoint, with the services that have it. The kill matrix tests each of them. Other names
/// do not compile.
pub const ALL: &[(&str, &[&str])] = &[
    ("gateway.before_forward", &["gateway"]),
    ("gateway.after_forward", &["gateway"]),
    ("place.before_begin", &["orders"]),
    ("place.before_commit", &["orders"]),
    ("place.after_commit", &["orders"]),
    ("relay.after_take", &["orders", "payments"]),
    ("relay.after_send", &["orders", "payments"]),
    ("relay.after_puback", &["orders", "payments"]),
    ("relay.after_mark", &["orders", "payments"]),
    ("relay.before_commit", &["orders", "payments"]),
    ("relay.after_commit", &["orders", "payments"]),
    ("consumer.after_fetch", &["orders", "payments"]),
    ("consumer.after_handle", &["orders", "payments"]),
    ("consumer.before_commit", &["orders", "payments"]),
    ("consumer.after_commit", &["orders", "payments"]),
    ("consumer.before_last_ack", &["orders", "payments"]),
    ("consumer.after_ack", &["orders", "payments"]),
    ("defer.before_commit", &["orders", "payments"]),
    ("defer.after_commit", &["orders", "payments"]),
    ("catch_up.after_take", &["orders", "payments"]),
    ("catch_up.before_commit", &["orders", "payments"]),
    ("catch_up.after_commit", &["orders", "payments"]),
    ("charge.after_lock", &["payments"]),
    ("charge.after_store", &["payments"]),
    ("settle.after_lock", &["orders"]),
    ("settle.after_end", &["orders"]),
    ("reconcile.after_lock", &["orders"]),
    ("reconcile.before_commit", &["orders"]),
    ("reconcile.after_commit", &["orders"]),
    ("account.before_commit", &["payments"]),
    ("account.after_commit", &["payments"]),
    ("deposit.after_add", &["payments"]),
    ("deposit.before_commit", &["payments"]),
    ("deposit.after_commit", &["payments"]),
];

/// The environment variable with the failpoint and its action: kill, error or pause.
pub const VARIABLE: &str = "GOZON_FAILPOINT";

/// Whether `name` is in [`ALL`]; checked at compile time.
pub const fn is_listed(name: &str) -> bool {
    let mut index = 0;
    while index < ALL.len() {
        if same(ALL[index].0.as_bytes(), name.as_bytes()) {
            return true;
        }
        index += 1;
    }
    false
}

const fn same(a: &[u8], b: &[u8]) -> bool {
    if a.len() != b.len() {
        return false;
    }
    let mut index = 0;
    while index < a.len() {
        if a[index] != b[index] {
            return false;
        }
        index += 1;
    }
    true
}

/// A failure injected by a test.
#[derive(Debug)]
pub struct Injected(pub &'static str);

impl fmt::Display for Injected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "failpoint {}", self.0)
    }
}

impl std::error::Error for Injected {}

/// A failpoint: the process may be killed, frozen, or fail with `Err(Injected)`. In a release build
/// always `Ok(())`.
#[macro_export]
macro_rules! failpoint {
    ($name:literal) => {{
        const {
            assert!(
                $crate::is_listed($name),
                "this failpoint is not in failpoint::ALL"
            )
        };
        #[cfg(debug_assertions)]
        let outcome = $crate::hit($name);
        #[cfg(not(debug_assertions))]
        let outcome = Ok::<(), $crate::Injected>(());
        outcome
    }};
}

/// Like [`failpoint!`] with the name `<work>.<step>`, for a name that is only known at run time.
/// Returns `Ok(())` if there is no such failpoint, and always in a release build.
pub fn of_work(work: &str, step: &str) -> Result<(), Injected> {
    #[cfg(debug_assertions)]
    {
        let has_name = |name: &str| name.split_once('.') == Some((work, step));
        if let Some((name, _)) = ALL.iter().find(|(name, _)| has_name(name)) {
            return hit(name);
        }
    }
    #[cfg(not(debug_assertions))]
    let _ = (work, step);
    Ok(())
}

/// Performs the configured action when the failpoint is reached for the first time.
#[cfg(debug_assertions)]
pub fn hit(name: &'static str) -> Result<(), Injected> {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicBool, Ordering};

    use rustix::process::{Signal, getpid, kill_process};

    static CONFIGURED: OnceLock<Option<(String, String)>> = OnceLock::new();
    static DONE: AtomicBool = AtomicBool::new(false);
    let configured = CONFIGURED.get_or_init(|| {
        let value = std::env::var(VARIABLE).ok()?;
        value
            .split_once('=')
            .map(|(name, action)| (name.to_owned(), action.to_owned()))
    });
    let Some((_, action)) = configured
        .as_ref()
        .filter(|(configured, _)| configured == name)
    else {
        return Ok(());
    };
    if DONE.swap(true, Ordering::SeqCst) {
        return Ok(());
    }
    tracing::warn!(failpoint = name, action, "Failpoint reached");
    let signal = match action.as_str() {
        "kill" => Signal::KILL,
        "pause" => Signal::STOP,
        _ => return Err(Injected(name)),
    };
    // A process is always permitted to signal itself.
    let _ = kill_process(getpid(), signal);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_listed_names_are_known() {
        assert!(is_listed("relay.after_send"));
        assert!(!is_listed("relay.after_sen") && !is_listed("relay.after_sends") && !is_listed(""));
        assert!(
            failpoint!("relay.after_send").is_ok(),
            "no action is configured"
        );
    }
}
