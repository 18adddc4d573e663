//! What this service shows of itself at `GET /metrics`.

use std::time::Duration;

use messaging::broker::Broker;
use messaging::measure;
use messaging::topology::PAYMENTS_ORDER_PLACED;
use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use sea_orm::DatabaseConnection;
use service_kit::metrics::Metrics;
use shared_contracts::DeclineReason;

use crate::entity::order;
use crate::order::Ended;

const PLACED: &str = "gozon_orders_placed_total";
const ENDED: &str = "gozon_orders_ended_total";
const SECONDS_TO_END: &str = "gozon_order_placed_to_final_duration_seconds";
const ASKED_AGAIN: &str = "gozon_orders_asked_again_total";
const OLDEST_NEW_SECONDS: &str = "gozon_oldest_new_order_age_seconds";

/// Begins to count, and looks up in `db` and at the broker what waits.
pub(crate) fn metrics(db: &DatabaseConnection, broker: &Broker) -> anyhow::Result<Metrics> {
    let metrics = Metrics::start("orders", env!("CARGO_PKG_VERSION"))?.refusing(&["orders_queue"]);
    measure::describe();
    describe_counter!(
        PLACED,
        "Requests for an order that were stored, or recognised as a repetition by their key"
    );
    describe_counter!(
        ENDED,
        "Orders that became final, by outcome: paid, or the reason of the refusal"
    );
    describe_histogram!(SECONDS_TO_END, "From placing an order to its final status");
    describe_counter!(
        ASKED_AGAIN,
        "Requests for payment that were sent again because the order stayed NEW"
    );
    describe_gauge!(
        OLDEST_NEW_SECONDS,
        "How long the oldest order that is not final has waited"
    );
    // What never happened is 0, and not absent.
    asked_again(0);
    for outcome in [
        "paid",
        DeclineReason::InsufficientFunds.as_str(),
        DeclineReason::NoAccount.as_str(),
    ] {
        counter!(ENDED, "outcome" => outcome).increment(0);
    }
    let (db, broker) = (db.clone(), broker.clone());
    let metrics = metrics.refresh(move || {
        let broker = broker.clone();
        async move {
            set(measure::look_at_broker(&broker, &PAYMENTS_ORDER_PLACED).await);
            Ok(())
        }
    });
    Ok(metrics.refresh(move || {
        let db = db.clone();
        async move {
            let waiting = measure::look(&db)
                .await
                .map_err(|error| error.to_string())?;
            let oldest = order::oldest_new_seconds(&db)
                .await
                .map_err(|error| error.to_string())?;
            set(waiting);
            gauge!(OLDEST_NEW_SECONDS).set(oldest);
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

/// A transaction stored orders, and recognised others.
pub(crate) fn placed(stored: usize, repeated: usize, duration: Duration) {
    histogram!(measure::TRANSACTION_SECONDS, "work" => "place").record(duration);
    counter!(PLACED, "result" => "stored").increment(stored as u64);
    counter!(PLACED, "result" => "repeated").increment(repeated as u64);
}

/// A transaction ended orders.
pub(crate) fn ended(ended: &[Ended]) {
    for one in ended {
        counter!(ENDED, "outcome" => one.reason.unwrap_or("paid")).increment(1);
        histogram!(SECONDS_TO_END).record(one.after.as_seconds_f64());
    }
}

/// Orders that stayed NEW were asked for again.
pub(crate) fn asked_again(orders: usize) {
    counter!(ASKED_AGAIN).increment(orders as u64);
}
