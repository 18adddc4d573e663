//! The metrics of this service (`GET /metrics`).

use messaging::Flow;
use metrics::{counter, describe_counter};
use service_kit::metrics::Metrics;
use shared_contracts::DeclineReason;

const DECISIONS: &str = "gozon_decisions_total";
const ANSWERED_AGAIN: &str = "gozon_answers_given_again_total";

pub(crate) fn metrics(flow: &Flow) -> anyhow::Result<Metrics> {
    let metrics = Metrics::start("payments", env!("CARGO_PKG_VERSION"))?;
    describe_counter!(
        DECISIONS,
        "Orders decided, by outcome: paid, or why they were declined"
    );
    describe_counter!(
        ANSWERED_AGAIN,
        "Stored decisions whose answer was published again because of a re-ask"
    );
    // Sets all counters to 0. Otherwise a counter is absent until its first event.
    counter!(ANSWERED_AGAIN).increment(0);
    let declined = [DeclineReason::InsufficientFunds, DeclineReason::NoAccount];
    for outcome in declined
        .map(DeclineReason::as_str)
        .into_iter()
        .chain(["paid"])
    {
        counter!(DECISIONS, "outcome" => outcome).increment(0);
    }
    Ok(flow.metrics(metrics))
}

pub(crate) fn decided(outcome: &'static str) {
    counter!(DECISIONS, "outcome" => outcome).increment(1);
}

pub(crate) fn answered_again(decisions: usize) {
    counter!(ANSWERED_AGAIN).increment(decisions as u64);
}
