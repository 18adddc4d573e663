//! The design: its guards, and which of them is missing.

/// A rule of the design. A broken design lacks exactly one guard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guard {
    /// An order that has a decision is not decided again.
    Decision,
    /// A decided order is recognised by its decision, not by the inbox, which is pruned.
    DecisionDecides,
    /// Decisions are never pruned.
    DecisionForEver,
    /// A refusal is stored as a decision.
    RefusalStored,
    /// Two messages about one order in a batch have the effect of one.
    BatchDistinct,
    /// The balance is read under a lock that is held until the commit.
    AccountLock,
    /// Decision and debit are one transaction.
    OneTransaction,
    /// A re-ask with a new number is answered again.
    ReArm,
    /// An order that stays NEW is re-asked.
    Reconciler,
    /// An order is re-asked after some time, even if no broker loss was noticed.
    Timer,
    /// An order is re-asked without a limit.
    UnlimitedAsks,
    /// Each re-ask has its own message id.
    FreshMessageId,
    /// A row is marked as published after its PubAck.
    PubAckFirst,
    /// A message is acknowledged after the commit.
    CommitBeforeAck,
    /// The request is an outbox row of the transaction that stores the order.
    Outbox,
    /// Nothing is published before its transaction is committed.
    CommitFirst,
    /// One key creates one order.
    OrderKey,
    /// One key creates one deposit.
    DepositKey,
    /// Only a NEW order becomes final.
    StatusGuard,
    /// The orders service never cancels an order by its own decision.
    OnlyPaymentsDecides,
}

/// How long the broker remembers message ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Window {
    /// For an arbitrary time.
    Unreliable,
    /// For ever.
    Endless,
}

/// The design, complete or without one guard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Design {
    /// The missing guard.
    pub broken: Option<Guard>,
    /// Removes the reconciler, which hides the absence of some guards: without them, orders only
    /// take longer, and the model has no time.
    pub without_reconciler: bool,
}

impl Design {
    pub fn has(self, guard: Guard) -> bool {
        self.broken != Some(guard) && !(self.without_reconciler && guard == Guard::Reconciler)
    }
}
