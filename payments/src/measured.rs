//! What this service shows of itself at `GET /metrics`.

use messaging::broker::Broker;
use messaging::measure;
use messaging::topology::ORDERS_PAYMENT_SETTLED;
use metrics::{counter, describe_counter, describe_gauge, gauge};
use sea_orm::DatabaseConnection;
use service_kit::metrics::Metrics;
use shared_contracts::DeclineReason;

use crate::charge::Charged;

const DECISIONS: &str = "gozon_decisions_total";
const ANSWERED_AGAIN: &str = "gozon_answers_given_again_total";

/// Begins to count, and looks up in `db` and at the broker what waits.
pub(crate) fn metrics(db: &DatabaseConnection, broker: &Broker) -> anyhow::Result<Metrics> {
    let metrics = Metrics::start("payments", env!("CARGO_PKG_VERSION"))?;
    measure::describe();
    describe_counter!(
        DECISIONS,
        "Orders decided, by outcome: paid, or the reason of the refusal"
    );
    describe_counter!(
        ANSWERED_AGAIN,
        "Stored decisions that were given again because orders asked again"
    );
    // What never happened is 0, and not absent.
    counter!(ANSWERED_AGAIN).increment(0);
    for outcome in [
        "paid",
        DeclineReason::InsufficientFunds.as_str(),
        DeclineReason::NoAccount.as_str(),
    ] {
        counter!(DECISIONS, "outcome" => outcome).increment(0);
    }
    let (db, broker) = (db.clone(), broker.clone());
    let metrics = metrics.refresh(move || {
        let broker = broker.clone();
        async move {
            set(measure::look_at_broker(&broker, &ORDERS_PAYMENT_SETTLED).await);
            Ok(())
        }
    });
    Ok(metrics.refresh(move || {
        let db = db.clone();
        async move {
            let waiting = measure::look(&db)
                .await
                .map_err(|error| error.to_string())?;
            set(waiting);
            Ok(())
        }
    }))
}

fn set(gauges: Vec<measure::Gauge>) {
    for (name, help, labels, value) in gauges {
        describe_gauge!(name, help);
        gauge!(name, &labels).set(value);
    }
}

/// A transaction decided orders.
pub(crate) fn charged(charged: &Charged) {
    for outcome in &charged.outcomes {
        counter!(DECISIONS, "outcome" => *outcome).increment(1);
    }
    counter!(ANSWERED_AGAIN).increment(charged.answered_again as u64);
}
