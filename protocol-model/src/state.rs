//! One state of the system, packed into 32 bytes: tens of millions of them are kept in memory.

use std::fmt;
use std::hash::{Hash, Hasher};

/// Orders in one model, at most.
pub const ORDERS_MAX: usize = 2;
/// Relays or consumers of one kind, at most.
pub const TWINS_MAX: usize = 2;

/// A word of named fields, each a few bits wide.
macro_rules! packed {
    ($(#[$doc:meta])* $name:ident($word:ty) { $($fields:tt)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name($word);

        impl $name {
            packed!(@fields $word, 0; $($fields)*);
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                packed!(@debug self, f.debug_struct(stringify!($name)); $($fields)*)
            }
        }
    };
    (@fields $word:ty, $at:expr; $(#[$doc:meta])* $get:ident, $set:ident: $width:literal; $($rest:tt)*) => {
        $(#[$doc])*
        pub fn $get(self) -> u8 {
            ((self.0 >> ($at)) & ((1 << $width) - 1)) as u8
        }

        #[doc = concat!("Writes [`Self::", stringify!($get), "`].")]
        pub fn $set(&mut self, value: u8) {
            debug_assert!(u32::from(value) < 1 << $width, concat!(stringify!($get), " does not fit"));
            let mask: $word = ((1 << $width) - 1) << ($at);
            self.0 = (self.0 & !mask) | (<$word>::from(value) << ($at));
        }

        packed!(@fields $word, $at + $width; $($rest)*);
    };
    (@fields $word:ty, $at:expr;) => {
        /// Bits in use.
        pub const BITS_USED: u32 = {
            let used = $at;
            assert!(used <= <$word>::BITS, "the fields do not fit into the word");
            used
        };
    };
    (@debug $self:ident, $debug:expr; $($(#[$doc:meta])* $get:ident, $set:ident: $width:literal;)*) => {
        // Only what is not zero: most of it is, most of the time.
        {
            let mut debug = $debug;
            $(if $self.$get() != 0 { debug.field(stringify!($get), &$self.$get()); })*
            debug.finish()
        }
    };
}

/// What the sender of a request knows.
pub mod client {
    /// It has not sent it yet.
    pub const SILENT: u8 = 0;
    /// It got no answer, and will send it again under the same key.
    pub const UNSURE: u8 = 1;
    /// It got a 2xx.
    pub const ANSWERED: u8 = 2;
}

/// `orders.status`.
pub mod status {
    /// There is no such order.
    pub const ABSENT: u8 = 0;
    /// Accepted, not yet decided as far as orders knows.
    pub const NEW: u8 = 1;
    /// Paid.
    pub const FINISHED: u8 = 2;
    /// Not paid.
    pub const CANCELLED: u8 = 3;
}

/// `payments.outcome`.
pub mod decision {
    /// There is no decision.
    pub const NONE: u8 = 0;
    /// Debited.
    pub const PAID: u8 = 1;
    /// Not debited.
    pub const DECLINED: u8 = 2;
}

packed! {
    /// Everything about one order: its row, its decision, both outboxes, both streams.
    ///
    /// A field that ends in `waiting`, `said` or `ready` is a set of message numbers: bit n is the n-th ask, bit 0 the
    /// first sending.
    Order(u64) {
        /// What its client knows.
        client, set_client: 2;
        /// How many orders this one intent has made; counted up to 3.
        made, set_made: 2;
        /// `orders.status`.
        status, set_status: 2;
        /// `orders.asks`.
        asks, set_asks: 2;
        /// How often its end was stored and told (`OrderFinished` or `OrderCancelled`).
        told, set_told: 2;
        /// Requests in the outbox of orders that are not marked as published.
        requests_waiting, set_requests_waiting: 4;
        /// Requests that the broker has ever stored: it may recognise their ids, and they may come again.
        requests_said, set_requests_said: 4;
        /// Requests in the stream that are not acknowledged: delivered, again and again.
        requests_ready, set_requests_ready: 4;
        /// `payments.outcome`.
        decision, set_decision: 2;
        /// Debits of this order; counted up to 3.
        debits, set_debits: 2;
        /// `payments.last_ask`.
        last_ask, set_last_ask: 2;
        /// Answers in the outbox of payments that are not marked as published.
        answers_waiting, set_answers_waiting: 4;
        /// Answers that the broker has ever stored.
        answers_said, set_answers_said: 4;
        /// Answers in the stream that are not acknowledged.
        answers_ready, set_answers_ready: 4;
        /// Whether the inbox of payments has it. Only where a broken design asks the inbox.
        inbox, set_inbox: 1;
        /// Whether its last request was published before a loss that was noticed (`reconciliation.lost_at`). Only
        /// where that alone makes an order due.
        due, set_due: 1;
    }
}

packed! {
    /// What all orders share: one account, the deposit into it, and how much may still go wrong.
    Shared(u32) {
        /// The balance in prices, shifted by [`BALANCE_ZERO`] so that a broken design may go below.
        balance, set_balance: 4;
        /// What the client of the deposit knows.
        deposit_client, set_deposit_client: 2;
        /// How often the deposit was made.
        deposited, set_deposited: 2;
        /// Losses that may still happen.
        losses_left, set_losses_left: 2;
        /// How often an order may still be asked for again although nothing was lost.
        slow_left, set_slow_left: 2;
        /// Whether the broker came back empty and nobody has noticed. Only where noticing matters.
        unnoticed, set_unnoticed: 1;
    }
}

/// [`Shared::balance`] of an account without money.
pub const BALANCE_ZERO: u8 = 4;

packed! {
    /// A relay and the row it holds. The default is idle.
    Relay(u8) {
        /// 0 idle, 1 taken, 2 the PubAck is there.
        phase, set_phase: 2;
        /// Which order the row is about.
        order, set_order: 1;
        /// Number of the row.
        n, set_n: 2;
    }
}

packed! {
    /// A consumer and the batch it holds. The default is idle.
    Hand(u16) {
        /// 0 idle, 1 fetched, 2 in the middle (broken designs only), 3 committed.
        phase, set_phase: 2;
        /// What was found out in the middle: bit i for order i (broken designs only).
        noted, set_noted: 2;
        /// Message numbers about order 0.
        first, set_first: 4;
        /// Message numbers about order 1.
        second, set_second: 4;
    }
}

impl Hand {
    /// The message numbers about an order.
    pub fn held(self, order: usize) -> u8 {
        if order == 0 {
            self.first()
        } else {
            self.second()
        }
    }

    /// Writes [`Self::held`].
    pub fn hold(&mut self, order: usize, numbers: u8) {
        if order == 0 {
            self.set_first(numbers)
        } else {
            self.set_second(numbers)
        }
    }
}

/// Which way a message travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Way {
    /// From orders to payments: `OrderPlaced`.
    Requests,
    /// From payments to orders: `PaymentSettled`.
    Answers,
}

impl Way {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::Requests, Self::Answers];
}

impl Order {
    /// Rows that wait in the outbox.
    pub fn waiting(self, way: Way) -> u8 {
        match way {
            Way::Requests => self.requests_waiting(),
            Way::Answers => self.answers_waiting(),
        }
    }

    /// Writes [`Self::waiting`].
    pub fn set_waiting(&mut self, way: Way, numbers: u8) {
        match way {
            Way::Requests => self.set_requests_waiting(numbers),
            Way::Answers => self.set_answers_waiting(numbers),
        }
    }

    /// Messages that the broker has ever stored.
    pub fn said(self, way: Way) -> u8 {
        match way {
            Way::Requests => self.requests_said(),
            Way::Answers => self.answers_said(),
        }
    }

    /// Writes [`Self::said`].
    pub fn set_said(&mut self, way: Way, numbers: u8) {
        match way {
            Way::Requests => self.set_requests_said(numbers),
            Way::Answers => self.set_answers_said(numbers),
        }
    }

    /// Messages that are delivered.
    pub fn ready(self, way: Way) -> u8 {
        match way {
            Way::Requests => self.requests_ready(),
            Way::Answers => self.answers_ready(),
        }
    }

    /// Writes [`Self::ready`].
    pub fn set_ready(&mut self, way: Way, numbers: u8) {
        match way {
            Way::Requests => self.set_requests_ready(numbers),
            Way::Answers => self.set_answers_ready(numbers),
        }
    }

    /// FINISHED or CANCELLED.
    pub fn is_final(self) -> bool {
        matches!(self.status(), status::FINISHED | status::CANCELLED)
    }
}

/// One state.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct State {
    /// The orders; those that the model does not have stay zero.
    pub orders: [Order; ORDERS_MAX],
    /// What they share.
    pub shared: Shared,
    /// Relays of orders, then of payments.
    pub relays: [[Relay; TWINS_MAX]; 2],
    /// Consumers of payments, then of orders.
    pub hands: [[Hand; TWINS_MAX]; 2],
}

impl State {
    /// Twins are alike, so their order means nothing: one state stands for all arrangements.
    pub fn arrange(&mut self) {
        for relays in &mut self.relays {
            relays.sort_unstable();
        }
        for hands in &mut self.hands {
            hands.sort_unstable();
        }
    }
}

impl Hash for State {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        let join = |words: &[u16]| {
            words
                .iter()
                .fold(0, |joined, word| (joined << 16) | u64::from(*word))
        };
        let [[a, b], [c, d]] = self.relays;
        let [[e, f], [g, h]] = self.hands;
        hasher.write_u64(self.orders[0].0);
        hasher.write_u64(self.orders[1].0);
        hasher.write_u64(
            (u64::from(self.shared.0) << 32) | u64::from(u32::from_be_bytes([a.0, b.0, c.0, d.0])),
        );
        hasher.write_u64(join(&[e.0, f.0, g.0, h.0]));
    }
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            orders,
            shared,
            relays,
            hands,
        } = self;
        write!(f, "{orders:?} {shared:?}")?;
        let busy = |phase: u8| phase != 0;
        for relay in relays.iter().flatten().filter(|relay| busy(relay.phase())) {
            write!(f, " {relay:?}")?;
        }
        for hand in hands.iter().flatten().filter(|hand| busy(hand.phase())) {
            write!(f, " {hand:?}")?;
        }
        Ok(())
    }
}
