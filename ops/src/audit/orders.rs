//! Compares orders, decisions and debits by a merge over the three tables in id order, so memory
//! use does not grow with the number of rows.

use std::collections::VecDeque;

use sea_orm::{DatabaseConnection, DbErr, FromQueryResult};
use uuid::Uuid;

use super::{Databases, FindingKind, Options, Report, rows};

const PAGE: i64 = 10_000;

#[derive(Clone, Debug, FromQueryResult)]
struct Order {
    id: Uuid,
    user_id: String,
    amount: i64,
    status: String,
    reason: Option<String>,
    age_seconds: f64,
    asks: i32,
}

#[derive(Clone, Debug, FromQueryResult)]
struct Decision {
    id: Uuid,
    user_id: String,
    amount: i64,
    outcome: String,
    reason: Option<String>,
    transfer_id: Option<Uuid>,
}

#[derive(Clone, Debug, FromQueryResult)]
struct Debit {
    id: Uuid,
    transfer_id: Uuid,
    user_id: String,
    amount: i64,
}

/// Reads a table page by page.
struct TableCursor<'a, T> {
    db: &'a DatabaseConnection,
    sql: &'static str,
    page: VecDeque<T>,
    after: Uuid,
    more: bool,
}

trait Keyed: FromQueryResult {
    fn key(&self) -> Uuid;
}

impl Keyed for Order {
    fn key(&self) -> Uuid {
        self.id
    }
}

impl Keyed for Decision {
    fn key(&self) -> Uuid {
        self.id
    }
}

impl Keyed for Debit {
    fn key(&self) -> Uuid {
        self.id
    }
}

impl<'a, T: Keyed> TableCursor<'a, T> {
    fn new(db: &'a DatabaseConnection, sql: &'static str) -> Self {
        Self {
            db,
            sql,
            page: VecDeque::new(),
            after: Uuid::nil(),
            more: true,
        }
    }

    /// The key of the next row.
    async fn peek(&mut self) -> Result<Option<Uuid>, DbErr> {
        if self.page.is_empty() && self.more {
            self.page = rows(self.db, self.sql, vec![self.after.into(), PAGE.into()])
                .await?
                .into();
            // A page may end inside a group of rows with one key (a doubled debit). Then that
            // group is read with the next page.
            self.more = self.page.len() as i64 >= PAGE;
            if self.more
                && let Some(last) = self.page.back().map(T::key)
            {
                while self.page.len() > 1 && self.page.back().is_some_and(|row| row.key() == last) {
                    self.page.pop_back();
                }
            }
            if let Some(last) = self.page.back() {
                self.after = last.key();
            }
        }
        Ok(self.page.front().map(T::key))
    }

    /// All rows with this key.
    async fn take(&mut self, key: Uuid) -> Result<Vec<T>, DbErr> {
        let mut group = Vec::new();
        while self.peek().await? == Some(key) {
            group.extend(self.page.pop_front());
        }
        Ok(group)
    }
}

pub(super) async fn check(
    databases: &Databases,
    options: Options,
    report: &mut Report,
) -> Result<(), DbErr> {
    let mut orders: TableCursor<'_, Order> = TableCursor::new(
        &databases.orders,
        "SELECT id, user_id, amount, status, reason, asks, extract(epoch FROM now() - stored_at)::float8 AS age_seconds
         FROM orders WHERE id > $1 ORDER BY id LIMIT $2",
    );
    let mut decisions: TableCursor<'_, Decision> = TableCursor::new(
        &databases.payments,
        "SELECT order_id AS id, user_id, amount, outcome, reason, transfer_id FROM payments WHERE order_id > $1 ORDER BY order_id LIMIT $2",
    );
    let mut debits: TableCursor<'_, Debit> = TableCursor::new(
        &databases.payments,
        "SELECT order_id AS id, id AS transfer_id, user_id, amount FROM transfers
         WHERE kind = 'payment' AND order_id > $1 ORDER BY order_id LIMIT $2",
    );
    let quarantined = quarantined(databases).await?;
    loop {
        // Orders first, at each step: see `audit_once_with`.
        let heads = [
            orders.peek().await?,
            decisions.peek().await?,
            debits.peek().await?,
        ];
        let Some(id) = heads.into_iter().flatten().min() else {
            return Ok(());
        };
        let order = orders.take(id).await?.pop();
        let decision = decisions.take(id).await?.pop();
        let debits = debits.take(id).await?;
        report.orders += u64::from(order.is_some());
        report.decisions += u64::from(decision.is_some());
        if let Some(order) = &order {
            *report.by_status.entry(order.status.clone()).or_default() += 1;
        }
        check_decision(id, decision.as_ref(), &debits, report);
        match &order {
            None => report.add(
                FindingKind::Unexpected,
                id,
                "there is a decision or a debit, but no order",
            ),
            Some(order) => check_order(
                order,
                decision.as_ref(),
                &debits,
                quarantined.contains(&id),
                options,
                report,
            ),
        }
    }
}

/// Decision against debits.
fn check_decision(id: Uuid, decision: Option<&Decision>, debits: &[Debit], report: &mut Report) {
    if debits.len() > 1 {
        let transfers: Vec<String> = debits
            .iter()
            .map(|debit| debit.transfer_id.to_string())
            .collect();
        report.add(
            FindingKind::DoubledDebit,
            id,
            format!("debited {} times: {}", debits.len(), transfers.join(", ")),
        );
    }
    match (decision, debits.first()) {
        (None, Some(debit)) => report.add(
            FindingKind::Unmatched,
            id,
            format!("debit {} without a decision", debit.transfer_id),
        ),
        (Some(decision), None) if decision.outcome == "paid" => report.add(
            FindingKind::Unmatched,
            id,
            "decided as paid, but there is no debit",
        ),
        (Some(decision), Some(debit)) if decision.outcome != "paid" => {
            report.add(
                FindingKind::Unmatched,
                id,
                format!("declined, but there is debit {}", debit.transfer_id),
            );
        }
        (Some(decision), Some(debit)) => {
            if (&decision.user_id, decision.amount, decision.transfer_id)
                != (&debit.user_id, debit.amount, Some(debit.transfer_id))
            {
                let words = format!(
                    "decision: amount {} of {}, transfer {}; debit: amount {} of {}, transfer {}",
                    decision.amount,
                    decision.user_id,
                    decision.transfer_id.unwrap_or_default(),
                    debit.amount,
                    debit.user_id,
                    debit.transfer_id
                );
                report.add(FindingKind::Divergent, id, words);
            }
        }
        (_, None) => {}
    }
}

/// Order against decision and debits.
fn check_order(
    order: &Order,
    decision: Option<&Decision>,
    debits: &[Debit],
    quarantined: bool,
    options: Options,
    report: &mut Report,
) {
    let id = order.id;
    if let Some(decision) = decision
        && (&order.user_id, order.amount) != (&decision.user_id, decision.amount)
    {
        let words = format!(
            "order: amount {} of {}; decision: amount {} of {}",
            order.amount, order.user_id, decision.amount, decision.user_id
        );
        report.add(FindingKind::Divergent, id, words);
    }
    match order.status.as_str() {
        "FINISHED" if debits.is_empty() => report.add(
            FindingKind::FinishedWithoutDebit,
            id,
            "FINISHED, but nothing was debited",
        ),
        "CANCELLED" if !debits.is_empty() => report.add(
            FindingKind::CancelledButDebited,
            id,
            "CANCELLED, but money was debited",
        ),
        "FINISHED" | "CANCELLED" => {
            let outcome = if order.status == "FINISHED" {
                "paid"
            } else {
                "declined"
            };
            let agrees = decision.is_some_and(|decision| {
                decision.outcome == outcome && decision.reason == order.reason
            });
            if !agrees {
                let decided = decision.map_or_else(
                    || "no decision".to_owned(),
                    |decision| {
                        [Some(decision.outcome.as_str()), decision.reason.as_deref()]
                            .into_iter()
                            .flatten()
                            .collect::<Vec<_>>()
                            .join(", ")
                    },
                );
                let status = [Some(order.status.as_str()), order.reason.as_deref()]
                    .into_iter()
                    .flatten()
                    .collect::<Vec<_>>()
                    .join(", ");
                report.add(
                    FindingKind::StatusDisagrees,
                    id,
                    format!("status: {status}; decision: {decided}"),
                );
            }
        }
        _ if quarantined => report.add(
            FindingKind::Quarantined,
            id,
            "NEW, and a message about it is an unresolved dead letter",
        ),
        _ if order.age_seconds > options.stuck_after.as_secs_f64() => {
            let decided = decision.map_or("not decided", |decision| decision.outcome.as_str());
            let words = format!(
                "NEW for {:.0} s, re-asked {} times, {decided}",
                order.age_seconds, order.asks
            );
            report.add(FindingKind::Stuck, id, words);
        }
        _ => {}
    }
}

/// Orders with an unresolved dead letter.
async fn quarantined(databases: &Databases) -> Result<std::collections::HashSet<Uuid>, DbErr> {
    #[derive(FromQueryResult)]
    struct About {
        order_id: Uuid,
    }
    let mut ids = std::collections::HashSet::new();
    for db in [&databases.orders, &databases.payments] {
        let about: Vec<About> =
            rows(db, "SELECT DISTINCT order_id FROM dead_letters WHERE order_id IS NOT NULL AND (replayed_at IS NULL OR last_seen_at > replayed_at)", Vec::new()).await?;
        ids.extend(about.into_iter().map(|one| one.order_id));
    }
    Ok(ids)
}
