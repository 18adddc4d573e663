//! The broken designs: each lacks one guard and must be caught.

use crate::design::{Design, Guard, Window};
use crate::model::Protocol;
use crate::properties::{I1, I2, I4, I5, I6, I7, I8};

/// A design without one guard.
#[derive(Clone, Copy, Debug)]
pub struct Broken {
    /// What the design does wrong.
    pub name: &'static str,
    /// The smallest model that reveals it.
    pub protocol: Protocol,
    /// The property that it violates.
    pub violates: &'static str,
}

/// One order, one process of each kind, no losses.
pub const SMALLEST: Protocol = Protocol {
    orders: 1,
    relays: 1,
    payments_consumers: 1,
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
/// Without losses, every order becomes final even without a reconciler.
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

pub const BROKEN: [Broken; 20] = [
    broken(
        "every delivery is decided again",
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
            payments_consumers: 2,
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
    broken("nothing is re-asked", Guard::Reconciler, LOSSY, I7),
    broken(
        "re-asks happen only after a noticed loss",
        Guard::Timer,
        LOSSY,
        I7,
    ),
    broken(
        "an order is re-asked only once",
        Guard::UnlimitedAsks,
        Protocol {
            losses: 2,
            ..SMALLEST
        },
        I7,
    ),
    broken(
        "a re-ask reuses the first message id",
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
    broken(
        "one key may create two orders",
        Guard::OrderKey,
        SMALLEST,
        I5,
    ),
    broken(
        "one key may create two deposits",
        Guard::DepositKey,
        Protocol {
            deposit: true,
            ..SMALLEST
        },
        I5,
    ),
    broken(
        "a final status is stored whatever the current status is",
        Guard::StatusGuard,
        SMALLEST,
        I6,
    ),
    broken(
        "orders cancels an order that takes too long",
        Guard::OnlyPaymentsDecides,
        SMALLEST,
        I2,
    ),
];
