//! What this service shows of itself at `GET /metrics`.

use messaging::measure;
use metrics::{counter, describe_counter};
use sea_orm::DatabaseConnection;
use service_kit::metrics::{Gauge, Metrics};

use crate::charge::Charged;

const DECISIONS: &str = "gozon_decisions_total";
const ANSWERED_AGAIN: &str = "gozon_answers_given_again_total";

/// Begins to count, and looks up in `db` what waits.
pub(crate) fn metrics(db: &DatabaseConnection) -> anyhow::Result<Metrics> {
    let metrics = Metrics::start("payments", env!("CARGO_PKG_VERSION"))?;
    measure::describe();
    describe_counter!(DECISIONS, "Orders decided, by outcome: paid, or the reason of the refusal");
    describe_counter!(ANSWERED_AGAIN, "Stored decisions that were given again because orders asked again");
    let db = db.clone();
    Ok(metrics.look(move || {
        let db = db.clone();
        async move {
            let waiting = measure::look(&db).await.map_err(|error| error.to_string())?;
            Ok(waiting.into_iter().map(Gauge::from).collect())
        }
    }))
}

/// A transaction decided orders.
pub(crate) fn charged(charged: &Charged) {
    for outcome in &charged.outcomes {
        counter!(DECISIONS, "outcome" => *outcome).increment(1);
    }
    counter!(ANSWERED_AGAIN).increment(charged.answered_again as u64);
}
