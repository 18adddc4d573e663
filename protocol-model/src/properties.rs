//! What must hold in every state, by the names of ARCHITECTURE.md. That every order can still be settled ([`I7`]) is
//! no property of one state: see [`recovery`](crate::recovery).

use stateright::Property;

use crate::model::Protocol;
use crate::state::{BALANCE_ZERO, Order, State, client, decision, status};

/// At most one debit.
pub const I1: &str = "I1 at most one debit per order";
/// The end says what was debited.
pub const I2: &str = "I2 FINISHED if and only if debited";
/// Money is conserved.
pub const I3: &str = "I3 balance = deposits - debits";
/// No negative balance.
pub const I4: &str = "I4 no negative balance";
/// What was answered exists once.
pub const I5: &str = "I5 one key, one effect; what was answered exists";
/// Final is final.
pub const I6: &str = "I6 an order ends once, and says so once";
/// No order hangs.
pub const I7: &str = "I7 every order can still be settled";
/// Nothing comes from nothing.
pub const I8: &str = "I8 nothing is decided that nobody placed";

/// Not vacuous: some order is paid.
const FINISHED: &str = "an order is FINISHED";
/// Not vacuous: some order is refused.
const CANCELLED: &str = "an order is CANCELLED";
/// Not vacuous: a decision is answered twice.
const ANSWERED_AGAIN: &str = "a re-ask is answered again";

fn each(protocol: &Protocol, state: &State, holds: impl Fn(Order) -> bool) -> bool {
    state.orders[..protocol.orders]
        .iter()
        .all(|order| holds(*order))
}

fn some(protocol: &Protocol, state: &State, holds: impl Fn(Order) -> bool) -> bool {
    state.orders[..protocol.orders]
        .iter()
        .any(|order| holds(*order))
}

/// All properties that make sense for this model.
pub fn all(protocol: &Protocol) -> Vec<Property<Protocol>> {
    let mut all = vec![
        Property::<Protocol>::always(I1, |protocol, state| {
            each(protocol, state, |order| order.debits() <= 1)
        }),
        Property::<Protocol>::always(I2, |protocol, state| {
            each(protocol, state, |order| match order.status() {
                status::FINISHED => order.debits() == 1,
                status::CANCELLED => order.debits() == 0,
                _ => true,
            })
        }),
        Property::<Protocol>::always(I3, |protocol, state| {
            let debits: u8 = state.orders.iter().map(|order| order.debits()).sum();
            BALANCE_ZERO + protocol.money + state.shared.deposited()
                == state.shared.balance() + debits
        }),
        Property::<Protocol>::always(I4, |_, state| state.shared.balance() >= BALANCE_ZERO),
        Property::<Protocol>::always(I5, |protocol, state| {
            let order = |order: Order| {
                order.made() <= 1 && (order.client() != client::ANSWERED || order.made() == 1)
            };
            let shared = state.shared;
            let deposit = shared.deposited() <= 1
                && (shared.deposit_client() != client::ANSWERED || shared.deposited() == 1);
            deposit && each(protocol, state, order)
        }),
        Property::<Protocol>::always(I6, |protocol, state| {
            each(protocol, state, |order| {
                order.told() == u8::from(order.is_final())
            })
        }),
        Property::<Protocol>::always(I8, |protocol, state| {
            each(protocol, state, |order| {
                order.decision() == decision::NONE || order.status() != status::ABSENT
            })
        }),
    ];
    if protocol.money > 0 || protocol.deposit {
        let finished = |protocol: &Protocol, state: &State| {
            some(protocol, state, |order| order.status() == status::FINISHED)
        };
        all.push(Property::<Protocol>::sometimes(FINISHED, finished));
    }
    if usize::from(protocol.money) < protocol.orders {
        let cancelled = |protocol: &Protocol, state: &State| {
            some(protocol, state, |order| order.status() == status::CANCELLED)
        };
        all.push(Property::<Protocol>::sometimes(CANCELLED, cancelled));
    }
    if protocol.losses + protocol.slow > 0 {
        let again = |protocol: &Protocol, state: &State| {
            some(protocol, state, |order| order.answers_said() > 1)
        };
        all.push(Property::<Protocol>::sometimes(ANSWERED_AGAIN, again));
    }
    all
}

/// Everything is done: every order is final, and nothing is on its way.
pub fn is_settled(protocol: &Protocol, state: &State) -> bool {
    each(protocol, state, |order| {
        order.is_final()
            && order.requests_waiting() == 0
            && order.answers_waiting() == 0
            && order.requests_ready() == 0
            && order.answers_ready() == 0
    })
}
