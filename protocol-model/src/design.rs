//! The design with all its guards, and the broken designs: each lacks one, and each is caught.

use crate::model::Protocol;
use crate::properties::{I1, I2, I4, I5, I6, I7, I8};

/// A rule of the design. A broken design lacks exactly one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guard {
    /// An order that has a decision is not decided again.
    Decision,
    /// It is the decision that says so, not the inbox, which is pruned.
    DecisionDecides,
    /// No decision is ever pruned.
    DecisionForEver,
    /// A refusal is a decision too.
    RefusalStored,
    /// Two messages about one order in one batch are one.
    BatchDistinct,
    /// The balance is read under a lock that is held until the commit.
    AccountLock,
    /// Decision and debit are one transaction.
    OneTransaction,
    /// A re-ask with a new number is answered again.
    ReArm,
    /// What stays NEW is asked for again.
    Reconciler,
    /// ... after some time, whether or not a loss was noticed.
    Timer,
    /// ... however often it was asked for.
    ForEver,
    /// A re-ask has a message id of its own.
    FreshMessageId,
    /// A row is marked as published after its PubAck.
    PubAckFirst,
    /// A message is acknowledged after the commit.
    CommitBeforeAck,
    /// The request is an outbox row of the transaction that stores the order.
    Outbox,
    /// Nothing is published about what is not committed.
    CommitFirst,
    /// A key makes one order.
    OrderKey,
    /// A key makes one deposit.
    DepositKey,
    /// Only a NEW order is ended.
    StatusGuard,
    /// Orders cancels nothing by itself.
    OnlyPaymentsDecides,
}

/// How long the broker recognises ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Window {
    /// Now and then.
    Unreliable,
    /// For ever.
    Endless,
}

/// The design, whole or without one guard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Design {
    /// The guard that is missing.
    pub broken: Option<Guard>,
    /// Whether nothing asks again. The reconciler would heal what some guards prevent: without them orders take
    /// longer, and nobody would see it here.
    pub without_reconciler: bool,
}

impl Design {
    /// Whether the design has a guard.
    pub fn has(self, guard: Guard) -> bool {
        self.broken != Some(guard) && !(self.without_reconciler && guard == Guard::Reconciler)
    }
}

/// A design without one of its guards.
#[derive(Clone, Copy, Debug)]
pub struct Broken {
    /// What is wrong with it.
    pub name: &'static str,
    /// The smallest model that shows it.
    pub protocol: Protocol,
    /// The property that it violates.
    pub violates: &'static str,
}

/// One order, one of everything, nothing lost.
pub const SMALLEST: Protocol = Protocol {
    orders: 1,
    relays: 1,
    workers: 1,
    losses: 0,
    slow: 0,
    money: 1,
    deposit: false,
    window: Window::Unreliable,
    design: Design {
        broken: None,
        without_reconciler: false,
    },
};

const LOSSY: Protocol = Protocol {
    losses: 1,
    ..SMALLEST
};
/// Nothing is lost, and nothing asks again: even so, every order ends.
pub const WITHOUT_LOSS_OR_RECONCILER: Protocol = Protocol {
    design: Design {
        broken: None,
        without_reconciler: true,
    },
    ..SMALLEST
};

const fn broken(
    name: &'static str,
    guard: Guard,
    protocol: Protocol,
    violates: &'static str,
) -> Broken {
    let design = Design {
        broken: Some(guard),
        ..protocol.design
    };
    Broken {
        name,
        protocol: Protocol { design, ..protocol },
        violates,
    }
}

/// The broken designs.
pub const BROKEN: [Broken; 20] = [
    broken(
        "every delivery is decided afresh",
        Guard::Decision,
        Protocol {
            money: 2,
            ..SMALLEST
        },
        I1,
    ),
    broken(
        "the inbox decides, and is pruned",
        Guard::DecisionDecides,
        Protocol {
            money: 2,
            ..SMALLEST
        },
        I1,
    ),
    broken(
        "decisions are pruned",
        Guard::DecisionForEver,
        Protocol {
            money: 2,
            ..SMALLEST
        },
        I1,
    ),
    broken(
        "a refusal is not stored",
        Guard::RefusalStored,
        Protocol {
            money: 0,
            deposit: true,
            ..SMALLEST
        },
        I2,
    ),
    broken(
        "a batch is not de-duplicated",
        Guard::BatchDistinct,
        Protocol {
            money: 2,
            slow: 1,
            ..SMALLEST
        },
        I1,
    ),
    broken(
        "the balance is read before it is locked",
        Guard::AccountLock,
        Protocol {
            orders: 2,
            workers: 2,
            ..SMALLEST
        },
        I4,
    ),
    broken(
        "debit and decision are two transactions",
        Guard::OneTransaction,
        Protocol {
            money: 2,
            ..SMALLEST
        },
        I1,
    ),
    broken("a re-ask is not answered again", Guard::ReArm, LOSSY, I7),
    broken("nothing asks again", Guard::Reconciler, LOSSY, I7),
    broken(
        "only a loss that was noticed is asked for again",
        Guard::Timer,
        LOSSY,
        I7,
    ),
    broken(
        "it is asked again only once",
        Guard::ForEver,
        Protocol {
            losses: 2,
            ..SMALLEST
        },
        I7,
    ),
    broken(
        "a re-ask has the first message id",
        Guard::FreshMessageId,
        Protocol {
            window: Window::Endless,
            ..LOSSY
        },
        I7,
    ),
    broken(
        "a row is marked before its PubAck",
        Guard::PubAckFirst,
        WITHOUT_LOSS_OR_RECONCILER,
        I7,
    ),
    broken(
        "a message is acknowledged before the commit",
        Guard::CommitBeforeAck,
        WITHOUT_LOSS_OR_RECONCILER,
        I7,
    ),
    broken(
        "published after the commit, without an outbox",
        Guard::Outbox,
        WITHOUT_LOSS_OR_RECONCILER,
        I7,
    ),
    broken(
        "published before the commit",
        Guard::CommitFirst,
        SMALLEST,
        I8,
    ),
    broken("a key may make two orders", Guard::OrderKey, SMALLEST, I5),
    broken(
        "a key may make two deposits",
        Guard::DepositKey,
        Protocol {
            deposit: true,
            ..SMALLEST
        },
        I5,
    ),
    broken(
        "an end is stored whatever the status",
        Guard::StatusGuard,
        SMALLEST,
        I6,
    ),
    broken(
        "orders cancels what takes too long",
        Guard::OnlyPaymentsDecides,
        SMALLEST,
        I2,
    ),
];
