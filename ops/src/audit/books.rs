//! Consistency of payments alone: balances, entries, transfers and keys, checked by SQL.

use sea_orm::{DatabaseConnection, DbErr};

use super::{FindingKind, Report, add_findings, count};

/// Each query returns `id` and `detail` of the rows that are wrong.
const QUERIES: [(FindingKind, &str); 5] = [
    (
        FindingKind::BalanceDrift,
        "SELECT a.user_id AS id, format('balance is %s, sum of transfers is %s; entry number is %s, number of transfers is %s', a.balance, t.total, a.entry_no, t.entries) AS detail
         FROM accounts a
         LEFT JOIN LATERAL (
             SELECT coalesce(sum(CASE kind WHEN 'deposit' THEN amount ELSE -amount END), 0) AS total, count(*) AS entries
             FROM transfers WHERE user_id = a.user_id
         ) t ON true
         WHERE a.balance <> t.total OR a.entry_no <> t.entries",
    ),
    (FindingKind::NegativeBalance, "SELECT user_id AS id, format('balance %s', balance) AS detail FROM accounts WHERE balance < 0"),
    (
        FindingKind::BrokenStatement,
        "SELECT user_id || ' entry ' || entry_no AS id, format('balance is %s after %s, expected %s', balance_after, before, expected) AS detail
         FROM (
             SELECT user_id, entry_no, balance_after,
                    coalesce(lag(balance_after) OVER statement, 0) AS before,
                    coalesce(lag(balance_after) OVER statement, 0) + CASE kind WHEN 'deposit' THEN amount ELSE -amount END AS expected,
                    row_number() OVER statement AS expected_no
             FROM transfers WINDOW statement AS (PARTITION BY user_id ORDER BY entry_no)
         ) entries
         WHERE balance_after <> expected OR entry_no <> expected_no OR balance_after < 0",
    ),
    (
        FindingKind::MalformedTransfer,
        "SELECT t.id::text AS id, format('%s of %s from %s to %s', t.kind, t.amount, t.debit_account, t.credit_account) AS detail
         FROM transfers t LEFT JOIN accounts a USING (user_id)
         WHERE a.user_id IS NULL OR t.amount <= 0
            OR NOT ((t.kind = 'payment' AND t.debit_account = 'user:' || t.user_id AND t.credit_account = 'shop' AND t.order_id IS NOT NULL)
                 OR (t.kind = 'deposit' AND t.debit_account = 'world' AND t.credit_account = 'user:' || t.user_id AND t.order_id IS NULL))",
    ),
    (
        FindingKind::DoubledKey,
        "SELECT user_id || ' ' || idempotency_key AS id, format('%s deposits under one key', count(*)) AS detail
         FROM transfers WHERE idempotency_key IS NOT NULL GROUP BY user_id, idempotency_key HAVING count(*) > 1",
    ),
];

pub(super) async fn check(payments: &DatabaseConnection, report: &mut Report) -> Result<(), DbErr> {
    report.accounts = count(payments, "SELECT count(*) FROM accounts").await?;
    report.transfers = count(payments, "SELECT count(*) FROM transfers").await?;
    for (kind, query) in QUERIES {
        add_findings(payments, kind, query, report).await?;
    }
    Ok(())
}
