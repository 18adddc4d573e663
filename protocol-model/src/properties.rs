//! The properties that must hold in every state, named as in ARCHITECTURE.md. [`I7`] (every order
//! can still be settled) is not a property of one state: see [`recovery`](crate::recovery).

use stateright::Property;

use crate::model::Protocol;
use crate::state::{BALANCE_ZERO, Order, State, client, decision, status};

pub const I1: &str = "I1 at most one debit per order";
pub const I2: &str = "I2 FINISHED if and only if debited";
pub const I3: &str = "I3 balance = deposits - debits";
pub const I4: &str = "I4 no negative balance";
pub const I5: &str = "I5 one key has one effect; every confirmed effect exists";
pub const I6: &str = "I6 an order becomes final once, with one final event";
pub const I7: &str = "I7 every order can still be settled";
pub const I8: &str = "I8 only placed orders are decided";

// These three must be reachable; otherwise the model proves nothing.
const FINISHED: &str = "an order is FINISHED";
const CANCELLED: &str = "an order is CANCELLED";
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

/// All properties that apply to this model.
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
                order.final_events() == u8::from(order.is_final())
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
            some(protocol, state, |order| order.answers_published() > 1)
        };
        all.push(Property::<Protocol>::sometimes(ANSWERED_AGAIN, again));
    }
    all
}

/// Whether every order is final and nothing is in flight.
pub fn is_settled(protocol: &Protocol, state: &State) -> bool {
    each(protocol, state, |order| {
        order.is_final()
            && order.requests_waiting() == 0
            && order.answers_waiting() == 0
            && order.requests_ready() == 0
            && order.answers_ready() == 0
    })
}
