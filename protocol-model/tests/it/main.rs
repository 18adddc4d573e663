//! Checks the small models, each broken design, and the names of failpoints.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::collections::BTreeSet;
use std::num::NonZeroUsize;

use protocol_model::action::{CrashPoint, NOT_MODELLED};
use protocol_model::broken::{BROKEN, SMALLEST, WITHOUT_LOSS_OR_RECONCILER};
use protocol_model::check::{caught, safety};
use protocol_model::design::Window;
use protocol_model::model::Protocol;
use protocol_model::recovery;

/// One order with all kinds of faults.
const ONE_ORDER: Protocol = Protocol {
    relays: 2,
    payments_consumers: 2,
    losses: 1,
    ..SMALLEST
};

/// Limit of states for small models. All of them have fewer.
const STATES_MAX: usize = 2_000_000;

#[test]
fn one_order_violates_no_property_under_any_fault() {
    let found = safety(&ONE_ORDER, NonZeroUsize::MIN, false);
    assert!(found.violated.is_empty(), "{:?}", found.violated);
    assert!(found.never.is_empty(), "{:?}", found.never);
    assert!(
        found.states > 1_000_000,
        "only {} states: the model lacks actions",
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
            payments_consumers: 2,
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
                .path
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
        );
    }
}

#[test]
fn every_broken_design_violates_the_property_of_its_guard() {
    for broken in BROKEN {
        let (property, path) = caught(&broken.protocol)
            .unwrap()
            .unwrap_or_else(|| panic!("not caught: {}", broken.name));
        assert_eq!(property, broken.violates, "{}: {:?}", broken.name, path);
        assert!(!path.is_empty());
    }
}

#[test]
fn the_same_models_with_their_guards_violate_nothing() {
    let mut seen = Vec::new();
    for broken in BROKEN {
        let mut complete = broken.protocol;
        complete.design.broken = None;
        // `./dev model` checks the one with two orders and two consumers.
        if complete.orders == 1 && !seen.contains(&complete) {
            assert_eq!(
                caught(&complete).unwrap(),
                None,
                "{}: with its guard",
                broken.name
            );
            seen.push(complete);
        }
    }
}

#[test]
fn every_failpoint_belongs_to_a_crash_point_of_the_model() {
    let of_code: BTreeSet<&str> = failpoint::ALL.iter().map(|(name, _)| *name).collect();
    let places = CrashPoint::ALL
        .iter()
        .flat_map(|place| place.failpoints())
        .chain(&NOT_MODELLED);
    let mut of_model = BTreeSet::new();
    for name in places {
        assert!(of_model.insert(*name), "{name} belongs to two crash points");
    }
    assert_eq!(of_model, of_code);
}
