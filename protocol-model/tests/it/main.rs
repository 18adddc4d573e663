//! The small models, whole; each broken design; and the names.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails there")]

use std::collections::BTreeSet;
use std::num::NonZeroUsize;

use protocol_model::action::{LEFT_OUT, Place};
use protocol_model::check::{caught, safety};
use protocol_model::design::{BROKEN, SMALLEST, WITHOUT_LOSS_OR_RECONCILER, Window};
use protocol_model::model::Protocol;
use protocol_model::recovery;

/// One order, with everything that can happen to it.
const ONE_ORDER: Protocol = Protocol {
    relays: 2,
    workers: 2,
    losses: 1,
    ..SMALLEST
};

/// The models of the tests are small.
const STATES_MAX: usize = 2_000_000;

#[test]
fn one_order_keeps_every_promise_whatever_happens() {
    let found = safety(&ONE_ORDER, NonZeroUsize::MIN, false);
    assert!(found.violated.is_empty(), "{:?}", found.violated);
    assert!(found.never.is_empty(), "{:?}", found.never);
    assert!(
        found.states > 1_000_000,
        "only {} states: the model has lost something",
        found.states
    );
}

#[test]
fn from_every_state_every_order_can_still_be_settled() {
    let configurations = [
        Protocol {
            losses: 1,
            money: 0,
            deposit: true,
            ..SMALLEST
        },
        Protocol {
            losses: 1,
            workers: 2,
            window: Window::Endless,
            ..SMALLEST
        },
        Protocol {
            orders: 2,
            ..SMALLEST
        },
        WITHOUT_LOSS_OR_RECONCILER,
    ];
    for protocol in configurations {
        let found = recovery::check(&protocol, STATES_MAX).unwrap();
        assert_eq!(
            found.stuck,
            0,
            "{protocol:?}: {:?}",
            found
                .way
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
        );
    }
}

#[test]
fn every_broken_design_violates_the_property_that_its_guard_is_for() {
    for broken in BROKEN {
        let (property, way) = caught(&broken.protocol)
            .unwrap()
            .unwrap_or_else(|| panic!("nobody notices: {}", broken.name));
        assert_eq!(property, broken.violates, "{}: {:?}", broken.name, way);
        assert!(!way.is_empty());
    }
}

#[test]
fn the_same_models_with_their_guards_violate_nothing() {
    let mut seen = Vec::new();
    for broken in BROKEN {
        let mut whole = broken.protocol;
        whole.design.broken = None;
        // Two orders and two workers are for `just model`.
        if whole.orders == 1 && !seen.contains(&whole) {
            assert_eq!(caught(&whole).unwrap(), None, "{} whole", broken.name);
            seen.push(whole);
        }
    }
}

#[test]
fn every_failpoint_of_the_code_has_its_place_in_the_model() {
    let of_code: BTreeSet<&str> = failpoint::ALL.iter().map(|(name, _)| *name).collect();
    let places = Place::ALL
        .iter()
        .flat_map(|place| place.failpoints())
        .chain(&LEFT_OUT);
    let mut of_model = BTreeSet::new();
    for name in places {
        assert!(of_model.insert(*name), "{name} has two places");
    }
    assert_eq!(of_model, of_code);
}
