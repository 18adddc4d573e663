//! Guards that `./dev bounty` removes one at a time, to prove that a test fails when the guard is
//! removed.
//!
//! A guard can be removed only in debug builds, and only with `GOZON_REMOVED_GUARD`. A release
//! build does not even contain the names.

/// Every removable guard, and what the service does without it. Other names do not compile.
pub const GUARDS: &[(&str, &str)] = &[
    (
        "place.outbox_row",
        "an order is stored without its OrderPlaced event",
    ),
    (
        "place.idempotency_key",
        "a repeated request creates another order",
    ),
    ("relay.puback", "outbox rows are marked without a PubAck"),
    (
        "consumer.ack_after_commit",
        "messages are acknowledged before the transaction begins",
    ),
    (
        "consumer.defer",
        "a batch waits until the row of every message is free",
    ),
    ("charge.decision_check", "existing decisions are ignored"),
    (
        "charge.decision_over_inbox",
        "the inbox determines whether an order is decided",
    ),
    (
        "charge.one_decision_in_a_batch",
        "each message of a batch is decided separately",
    ),
    (
        "charge.refusal_stored",
        "a refusal is not stored as a decision",
    ),
    (
        "charge.same_request",
        "a decided order is not compared with the request",
    ),
    ("charge.enough_money", "the balance is not checked"),
    ("charge.re_arm", "a re-ask is not answered again"),
    (
        "account.lock",
        "accounts are read without a lock, and entry numbers may repeat",
    ),
    (
        "deposit.idempotency_key",
        "a repeated request creates another deposit",
    ),
    (
        "payments.append_only",
        "transfers and decisions can be changed and deleted",
    ),
    (
        "settle.status_guard",
        "answers are applied to final orders too",
    ),
    (
        "settle.same_content",
        "an answer about another user or amount is applied",
    ),
    ("orders.final", "final orders can be changed"),
    ("reconcile.ask_again", "no order is re-asked"),
    ("reconcile.lost_at", "a noticed broker loss is not recorded"),
    (
        "reconcile.fresh_message_id",
        "a re-ask reuses the message id of the first request",
    ),
];

/// The environment variable that names the guard to remove.
pub const REMOVED_GUARD: &str = "GOZON_REMOVED_GUARD";

/// Whether this guard is removed. In a release build always `false`.
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

/// Whether `name` is in [`GUARDS`]; checked at compile time.
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

/// Whether the environment removes this guard.
#[cfg(debug_assertions)]
pub fn is_removed(name: &str) -> bool {
    use std::sync::OnceLock;

    static REMOVED: OnceLock<Option<String>> = OnceLock::new();
    let removed = REMOVED.get_or_init(|| {
        let removed = std::env::var(REMOVED_GUARD).ok()?;
        tracing::error!(
            guard = removed,
            "A guard is removed for a test; do not use this service for real money"
        );
        Some(removed)
    });
    removed.as_deref() == Some(name)
}
