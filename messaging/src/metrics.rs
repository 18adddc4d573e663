//! Names of the flow's metrics. The backlog gauges are in [`backlog`](crate::backlog).

use metrics::{describe_counter, describe_histogram};

pub(crate) const PUBLISHED: &str = "gozon_published_total";
pub(crate) const PUBLISH_SECONDS: &str = "gozon_publish_duration_seconds";
pub(crate) const MESSAGES: &str = "gozon_messages_total";
pub(crate) const TRANSACTION_SECONDS: &str = "gozon_transaction_duration_seconds";

/// Call it once at start.
pub(crate) fn describe() {
    describe_counter!(PUBLISHED, "Outbox rows sent to the broker, by result");
    describe_histogram!(
        PUBLISH_SECONDS,
        "Time from sending a batch of outbox rows to the last PubAck"
    );
    describe_counter!(
        MESSAGES,
        "Messages consumed: first deliveries, repetitions, dead letters"
    );
    describe_histogram!(
        TRANSACTION_SECONDS,
        "Time from BEGIN to COMMIT, by purpose of the transaction"
    );
}
