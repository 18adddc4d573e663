//! A state of the system, packed into 32 bytes: tens of millions of states are kept in memory.

use std::fmt;
use std::hash::{Hash, Hasher};

/// Maximum number of orders in a model.
pub const ORDERS_MAX: usize = 2;
/// Maximum number of relays or consumers of one kind.
pub const REPLICAS_MAX: usize = 2;

/// Defines an integer with named bit fields.
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
        // Shows only fields that are not zero; most fields are zero.
        {
            let mut debug = $debug;
            $(if $self.$get() != 0 { debug.field(stringify!($get), &$self.$get()); })*
            debug.finish()
        }
    };
}

/// What a client knows about its request.
pub mod client {
    pub const NOT_SENT: u8 = 0;
    /// No answer: the client will retry under the same key.
    pub const UNKNOWN: u8 = 1;
    /// Answered with 2xx.
    pub const ANSWERED: u8 = 2;
}

/// `orders.status`.
pub mod status {
    pub const ABSENT: u8 = 0;
    /// Accepted; orders knows no decision.
    pub const NEW: u8 = 1;
    pub const FINISHED: u8 = 2;
    pub const CANCELLED: u8 = 3;
}

/// `payments.outcome`.
pub mod decision {
    pub const NONE: u8 = 0;
    pub const PAID: u8 = 1;
    pub const DECLINED: u8 = 2;
}

packed! {
    /// Everything about one order: its row, its decision, both outboxes and both streams.
    ///
    /// A field that ends in `waiting`, `published` or `ready` is a set of message numbers: bit 0 is
    /// the first message, bit n the n-th re-ask.
    Order(u64) {
        /// See [`client`].
        client, set_client: 2;
        /// Orders created by this one key, counted up to 3.
        made, set_made: 2;
        /// `orders.status`.
        status, set_status: 2;
        /// `orders.asks`.
        asks, set_asks: 2;
        /// Number of final events (`OrderFinished` or `OrderCancelled`).
        final_events, set_final_events: 2;
        /// Unpublished requests in the outbox of orders.
        requests_waiting, set_requests_waiting: 4;
        /// Requests that the broker has ever stored: it may recognise their ids, and may deliver
        /// them again.
        requests_published, set_requests_published: 4;
        /// Unacknowledged requests in the stream, which are redelivered.
        requests_ready, set_requests_ready: 4;
        /// `payments.outcome`.
        decision, set_decision: 2;
        /// Debits of this order, counted up to 3.
        debits, set_debits: 2;
        /// `payments.last_ask`.
        last_ask, set_last_ask: 2;
        /// Unpublished answers in the outbox of payments.
        answers_waiting, set_answers_waiting: 4;
        /// Answers that the broker has ever stored.
        answers_published, set_answers_published: 4;
        /// Unacknowledged answers in the stream.
        answers_ready, set_answers_ready: 4;
        /// Whether the inbox of payments has a row for it. Used only by a broken design.
        inbox, set_inbox: 1;
        /// Whether its last request was published before a noticed loss (`reconciliation.lost_at`).
        /// Used only by the design where nothing else makes an order due.
        due, set_due: 1;
    }
}

packed! {
    /// State shared by all orders: the account, the deposit, and the remaining faults.
    Shared(u32) {
        /// The balance in prices, plus [`BALANCE_ZERO`], so that a broken design can go below zero.
        balance, set_balance: 4;
        /// What the client of the deposit knows: see [`client`].
        deposit_client, set_deposit_client: 2;
        /// How often the deposit was made.
        deposited, set_deposited: 2;
        /// Losses that may still happen.
        losses_left, set_losses_left: 2;
        /// How often an order may still be re-asked although nothing was lost.
        slow_left, set_slow_left: 2;
        /// Whether a broker loss is not noticed yet. Used only where noticing matters.
        unnoticed, set_unnoticed: 1;
    }
}

/// [`Shared::balance`] of an account without money.
pub const BALANCE_ZERO: u8 = 4;

packed! {
    /// A relay and the row it holds. The default is idle.
    Relay(u8) {
        /// 0 idle, 1 row taken, 2 PubAck received.
        phase, set_phase: 2;
        /// The order that the row is about.
        order, set_order: 1;
        /// Number of the row.
        n, set_n: 2;
    }
}

packed! {
    /// A consumer and the batch it holds. The default is idle.
    Consumer(u16) {
        /// 0 idle, 1 fetched, 2 half applied (broken designs only), 3 committed.
        phase, set_phase: 2;
        /// Result of the first half: bit i for order i (broken designs only).
        noted, set_noted: 2;
        /// Message numbers about order 0.
        first, set_first: 4;
        /// Message numbers about order 1.
        second, set_second: 4;
    }
}

impl Consumer {
    /// The message numbers about an order.
    pub fn held(self, order: usize) -> u8 {
        if order == 0 {
            self.first()
        } else {
            self.second()
        }
    }

    pub fn hold(&mut self, order: usize, numbers: u8) {
        if order == 0 {
            self.set_first(numbers)
        } else {
            self.set_second(numbers)
        }
    }
}

/// The direction of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Channel {
    /// From orders to payments: `OrderPlaced`.
    Requests,
    /// From payments to orders: `PaymentSettled`.
    Answers,
}

impl Channel {
    pub const BOTH: [Self; 2] = [Self::Requests, Self::Answers];
}

impl Order {
    /// Unpublished outbox rows.
    pub fn waiting(self, channel: Channel) -> u8 {
        match channel {
            Channel::Requests => self.requests_waiting(),
            Channel::Answers => self.answers_waiting(),
        }
    }

    pub fn set_waiting(&mut self, channel: Channel, numbers: u8) {
        match channel {
            Channel::Requests => self.set_requests_waiting(numbers),
            Channel::Answers => self.set_answers_waiting(numbers),
        }
    }

    /// Messages that the broker has ever stored.
    pub fn published(self, channel: Channel) -> u8 {
        match channel {
            Channel::Requests => self.requests_published(),
            Channel::Answers => self.answers_published(),
        }
    }

    pub fn set_published(&mut self, channel: Channel, numbers: u8) {
        match channel {
            Channel::Requests => self.set_requests_published(numbers),
            Channel::Answers => self.set_answers_published(numbers),
        }
    }

    /// Unacknowledged messages.
    pub fn ready(self, channel: Channel) -> u8 {
        match channel {
            Channel::Requests => self.requests_ready(),
            Channel::Answers => self.answers_ready(),
        }
    }

    pub fn set_ready(&mut self, channel: Channel, numbers: u8) {
        match channel {
            Channel::Requests => self.set_requests_ready(numbers),
            Channel::Answers => self.set_answers_ready(numbers),
        }
    }

    pub fn is_final(self) -> bool {
        matches!(self.status(), status::FINISHED | status::CANCELLED)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub struct State {
    /// Unused orders stay zero.
    pub orders: [Order; ORDERS_MAX],
    pub shared: Shared,
    /// Relays of orders, then of payments.
    pub relays: [[Relay; REPLICAS_MAX]; 2],
    /// Consumers of payments, then of orders.
    pub consumers: [[Consumer; REPLICAS_MAX]; 2],
}

impl State {
    /// Sorts the replicas, because their order has no meaning: one state represents all
    /// permutations.
    pub fn normalise(&mut self) {
        for relays in &mut self.relays {
            relays.sort_unstable();
        }
        for consumers in &mut self.consumers {
            consumers.sort_unstable();
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
        let [[e, f], [g, h]] = self.consumers;
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
            consumers,
        } = self;
        write!(f, "{orders:?} {shared:?}")?;
        let busy = |phase: u8| phase != 0;
        for relay in relays.iter().flatten().filter(|relay| busy(relay.phase())) {
            write!(f, " {relay:?}")?;
        }
        for consumer in consumers
            .iter()
            .flatten()
            .filter(|consumer| busy(consumer.phase()))
        {
            write!(f, " {consumer:?}")?;
        }
        Ok(())
    }
}
