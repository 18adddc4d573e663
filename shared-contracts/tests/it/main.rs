//! The JSON of the events: one golden file per event and version. A changed file is a changed
//! contract.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

mod schemas;

use std::fmt::Debug;

use serde_json::Value;
use shared_contracts::{
    Amount, DeclineReason, Event, OrderCancelled, OrderFinished, OrderId, OrderPlaced,
    PaymentOutcome, PaymentSettled, UserId,
};

fn order_id() -> OrderId {
    "01933f3c-7d5a-7b60-9d6f-3f0b4b1f2a11".parse().unwrap()
}

fn user_id() -> UserId {
    UserId::parse("alice").unwrap()
}

fn amount() -> Amount {
    Amount::new(1299).unwrap()
}

fn placed() -> OrderPlaced {
    OrderPlaced {
        order_id: order_id(),
        user_id: user_id(),
        amount: amount(),
    }
}

fn settled(outcome: PaymentOutcome) -> PaymentSettled {
    PaymentSettled {
        order_id: order_id(),
        user_id: user_id(),
        amount: amount(),
        outcome,
    }
}

#[track_caller]
fn assert_golden<E: Event + Debug + PartialEq>(event: &E, golden: &str) {
    let golden_value: Value = serde_json::from_str(golden).unwrap();
    assert_eq!(
        serde_json::to_value(event).unwrap(),
        golden_value,
        "{} is serialized differently",
        E::TYPE
    );
    assert_eq!(
        serde_json::from_str::<E>(golden).unwrap(),
        *event,
        "{} is deserialized differently",
        E::TYPE
    );

    let mut newer = golden_value;
    newer["a_field_of_tomorrow"] = Value::from(1);
    assert_eq!(
        serde_json::from_value::<E>(newer).unwrap(),
        *event,
        "{} does not tolerate an unknown field",
        E::TYPE
    );
}

#[test]
fn every_event_reads_and_writes_its_golden_file() {
    assert_golden(
        &placed(),
        include_str!("../golden/gozon.order.placed.v1.json"),
    );
    assert_golden(
        &OrderFinished {
            order_id: order_id(),
            user_id: user_id(),
            amount: amount(),
        },
        include_str!("../golden/gozon.order.finished.v1.json"),
    );
    assert_golden(
        &OrderCancelled {
            order_id: order_id(),
            user_id: user_id(),
            amount: amount(),
            reason: DeclineReason::InsufficientFunds,
        },
        include_str!("../golden/gozon.order.cancelled.v1.json"),
    );
    assert_golden(
        &settled(PaymentOutcome::Paid),
        include_str!("../golden/gozon.payment.settled.v1.paid.json"),
    );
    assert_golden(
        &settled(PaymentOutcome::Declined {
            reason: DeclineReason::NoAccount,
        }),
        include_str!("../golden/gozon.payment.settled.v1.declined.json"),
    );
}

#[test]
fn an_event_with_an_invalid_value_is_rejected() {
    let good = serde_json::to_value(placed()).unwrap();
    for (field, bad) in [
        ("amount", Value::from(0)),
        ("amount", Value::from(-1)),
        ("amount", Value::from(1.5)),
        ("amount", Value::from("1299")),
        ("user_id", Value::from("a b")),
        ("order_id", Value::from("1")),
    ] {
        let mut event = good.clone();
        event[field] = bad.clone();
        assert!(
            serde_json::from_value::<OrderPlaced>(event).is_err(),
            "{field} = {bad}"
        );
    }
    let mut declined_without_reason = serde_json::to_value(settled(PaymentOutcome::Paid)).unwrap();
    declined_without_reason["outcome"] = Value::from("declined");
    assert!(serde_json::from_value::<PaymentSettled>(declined_without_reason).is_err());
}
