//! Guards that a test takes away, one at a time, to see that something notices.
//!
//! Only in debug builds, and only where `GOZON_REMOVED_GUARD` names one. A release build has no trace of it.

/// Every guard that can be taken away, and what the service does without it. `just bounty` runs each; a name that is not
/// here does not compile.
pub const GUARDS: &[(&str, &str)] = &[
    (
        "place.outbox_row",
        "an order is stored without the fact that it was placed",
    ),
    (
        "place.idempotency_key",
        "a repeated request makes another order",
    ),
    ("relay.puback", "outbox rows are marked without a PubAck"),
    (
        "consumer.ack_after_commit",
        "messages are acknowledged before the transaction begins",
    ),
    (
        "charge.decision_check",
        "decisions that exist are not looked at",
    ),
    (
        "charge.decision_over_inbox",
        "the inbox says whether an order is decided",
    ),
    (
        "charge.one_decision_in_a_batch",
        "each message of a batch is decided by itself",
    ),
    ("charge.refusal_stored", "a refusal leaves no decision"),
    (
        "charge.same_request",
        "a decided order is not compared with what is asked",
    ),
    ("charge.enough_money", "the balance is not looked at"),
    ("charge.re_arm", "a re-ask is not answered again"),
    (
        "account.lock",
        "accounts are read without a lock, and numbers of entries may repeat",
    ),
    (
        "deposit.idempotency_key",
        "a repeated request makes another deposit",
    ),
    (
        "payments.append_only",
        "transfers and decisions can be changed and deleted",
    ),
    ("settle.status_guard", "a final order is ended again"),
    (
        "settle.same_content",
        "an answer about another user or amount is applied",
    ),
    ("orders.final", "final orders can be changed"),
    ("reconcile.ask_again", "nothing is asked for again"),
    ("reconcile.lost_at", "a loss that was noticed is not noted"),
    (
        "reconcile.fresh_message_id",
        "a re-ask has the message id of the first request",
    ),
];

/// The environment variable that names the guard to take away.
pub const REMOVED_GUARD: &str = "GOZON_REMOVED_GUARD";

/// Whether this guard is taken away. In a release build always `false`.
#[macro_export]
macro_rules! removed {
    ($name:literal) => {{
        const {
            assert!(
                $crate::is_guard($name),
                "this guard is not in failpoint::GUARDS"
            )
        };
        #[cfg(debug_assertions)]
        let removed = $crate::is_removed($name);
        #[cfg(not(debug_assertions))]
        let removed = false;
        removed
    }};
}

/// Whether `name` is listed. For the check at compile time.
pub const fn is_guard(name: &str) -> bool {
    let mut index = 0;
    while index < GUARDS.len() {
        if crate::same(GUARDS[index].0.as_bytes(), name.as_bytes()) {
            return true;
        }
        index += 1;
    }
    false
}

/// Whether the environment says so.
#[cfg(debug_assertions)]
pub fn is_removed(name: &str) -> bool {
    use std::sync::OnceLock;

    static REMOVED: OnceLock<Option<String>> = OnceLock::new();
    let removed = REMOVED.get_or_init(|| {
        let removed = std::env::var(REMOVED_GUARD).ok()?;
        tracing::error!(
            guard = removed,
            "A guard is taken away; this is no service to rely on"
        );
        Some(removed)
    });
    removed.as_deref() == Some(name)
}
