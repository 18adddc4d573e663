//! The metrics of this service (`GET /metrics`).

use std::future::ready;

use messaging::Flow;
use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use service_kit::metrics::Metrics;
use shared_contracts::DeclineReason;

const PLACED: &str = "gozon_orders_placed_total";
const ENDED: &str = "gozon_orders_ended_total";
const SECONDS_TO_END: &str = "gozon_order_placed_to_final_duration_seconds";
const ASKED_AGAIN: &str = "gozon_orders_asked_again_total";
const OLDEST_NEW_SECONDS: &str = "gozon_oldest_new_order_age_seconds";

pub(crate) fn metrics(flow: &Flow) -> anyhow::Result<Metrics> {
    let metrics = Metrics::start("orders", env!("CARGO_PKG_VERSION"))?.refusing(&["orders_queue"]);
    describe_counter!(
        PLACED,
        "Orders placed, by result: stored, or repeated under a known key"
    );
    describe_counter!(
        ENDED,
        "Orders that became final, by outcome: paid, or why they were cancelled"
    );
    describe_histogram!(
        SECONDS_TO_END,
        "Time from placing an order to its final status"
    );
    describe_counter!(
        ASKED_AGAIN,
        "Re-asks: payment requests sent again because the order stayed NEW"
    );
    describe_gauge!(OLDEST_NEW_SECONDS, "Age of the oldest order that is NEW");
    // Sets all counters to 0. Otherwise a counter is absent until its first event.
    asked_again(0);
    let declined = [DeclineReason::InsufficientFunds, DeclineReason::NoAccount];
    for outcome in declined
        .map(DeclineReason::as_str)
        .into_iter()
        .chain(["paid"])
    {
        counter!(ENDED, "outcome" => outcome).increment(0);
    }
    let operators = flow.operator_api();
    let metrics = metrics.refresh(move || {
        if let Some(unsettled) = operators.pending_requests() {
            gauge!(OLDEST_NEW_SECONDS).set(unsettled.oldest_seconds);
        }
        ready(Ok(()))
    });
    Ok(flow.metrics(metrics))
}

/// A transaction stored new orders and recognised repeated requests.
pub(crate) fn placed(stored: usize, repeated: usize) {
    counter!(PLACED, "result" => "stored").increment(stored as u64);
    counter!(PLACED, "result" => "repeated").increment(repeated as u64);
}

/// An order became final; `after` is the time since it was placed. `reason` is set if it was
/// cancelled.
pub(crate) fn ended(reason: Option<&'static str>, after: time::Duration) {
    counter!(ENDED, "outcome" => reason.unwrap_or("paid")).increment(1);
    histogram!(SECONDS_TO_END).record(after.as_seconds_f64());
}

pub(crate) fn asked_again(orders: usize) {
    counter!(ASKED_AGAIN).increment(orders as u64);
}
