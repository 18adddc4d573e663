//! Output of the tool as text for people.

use std::time::Duration;

use messaging::Replay;
use ops::audit::Report;
use ops::dead_letters::ServiceDeadLetter;
use ops::outbox::{OutboxStatus, Resent};
use ops::streams::{ConsumerSummary, StoredMessage, StreamSummary};
use ops::topology::TopologyItem;
use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

pub(crate) fn dead_letter(letter: &ServiceDeadLetter) -> String {
    let state = if letter.waits {
        "unresolved"
    } else {
        "replayed"
    };
    format!(
        "{} {:<8} {:<10} {:<10} {:>3}x {}  {}",
        letter.id,
        letter.service,
        letter.kind,
        state,
        letter.times,
        letter.created_at.format(&Rfc3339).unwrap_or_default(),
        letter.cause
    )
}

/// In the order in which an order passes through them.
const TABLES: [&str; 9] = [
    "order",
    "requests",
    "taken_by_payments",
    "decision",
    "debits",
    "answers",
    "taken_by_orders",
    "ends",
    "dead_letters",
];

/// A heading for each row and a line for each value. Empty tables and values are omitted.
pub(crate) fn order(tables: &Value) -> String {
    let mut lines = Vec::new();
    for table in TABLES {
        let rows = &tables[table];
        let rows = rows
            .as_array()
            .map_or_else(|| std::slice::from_ref(rows), Vec::as_slice);
        for row in rows.iter().filter_map(Value::as_object) {
            lines.push(table.replace('_', " "));
            let width = row.keys().map(String::len).max().unwrap_or(0);
            for (column, value) in row.iter().filter(|(_, value)| !value.is_null()) {
                let value = value
                    .as_str()
                    .map_or_else(|| value.to_string(), str::to_owned);
                lines.push(format!("    {column:<width$}  {value}"));
            }
        }
    }
    lines.join("\n")
}

pub(crate) fn replays(replays: &[Replay]) -> String {
    let line = |one: &Replay| {
        let dry_run = if one.dry_run { " (dry run)" } else { "" };
        format!("{} {}{dry_run}: {}", one.id, one.outcome, one.detail)
    };
    match replays.is_empty() {
        true => "There are no unresolved dead letters.".to_owned(),
        false => replays.iter().map(line).collect::<Vec<_>>().join("\n"),
    }
}

pub(crate) fn topology(items: &[TopologyItem]) -> String {
    let mut lines = Vec::new();
    for item in items {
        let mut state = match (item.there, item.drift.is_empty()) {
            (false, _) => "absent".to_owned(),
            (true, true) => "as expected".to_owned(),
            (true, false) => item.drift.join(", "),
        };
        if !item.changed.is_empty() {
            state.push_str(&format!(" (before: {})", item.changed.join(", ")));
        }
        lines.push(format!(
            "{:<33} {:>8} messages {:>6} unacked {:>6} redelivered  {state}",
            item.name, item.messages, item.ack_pending, item.redelivered
        ));
    }
    lines.join("\n")
}

pub(crate) fn report(report: &Report, took: Duration) -> String {
    let mut text = format!(
        "{} orders ({}), {} decisions, {} transfers, {} accounts in {:.1} s\n",
        report.orders,
        report
            .by_status
            .iter()
            .map(|(status, number)| format!("{number} {status}"))
            .collect::<Vec<_>>()
            .join(", "),
        report.decisions,
        report.transfers,
        report.accounts,
        took.as_secs_f64()
    );
    if report.messages > 0 {
        text.push_str(&format!(
            "compared with {} messages in the streams\n",
            report.messages
        ));
    }
    for what in &report.not_looked_at {
        text.push_str(&format!("not checked: {what}\n"));
    }
    if report.exchanges > 0 {
        text.push_str(&format!(
            "compared with {} exchanges of a client's history\n",
            report.exchanges
        ));
    }
    for finding in &report.findings {
        text.push_str(&format!(
            "  {:<22} {}  {}\n",
            finding.kind, finding.id, finding.detail
        ));
    }
    text.push_str(&match report.findings.len() {
        0 => "Everything is consistent.\n".to_owned(),
        number => format!("{number} findings.\n"),
    });
    text
}

pub(crate) fn outboxes(outboxes: &[OutboxStatus]) -> String {
    let line = |one: &OutboxStatus| {
        format!(
            "{:<9} {:>7} unpublished, the oldest for {:.1} s, at most {} attempts",
            one.service, one.pending, one.oldest_seconds, one.attempts_max
        )
    };
    outboxes.iter().map(line).collect::<Vec<_>>().join("\n")
}

pub(crate) fn resent(resent: &[Resent], dry_run: bool) -> String {
    let done = if dry_run {
        "would be published again"
    } else {
        "will be published again"
    };
    let line = |one: &Resent| format!("{:<9} {:>7} messages {done}", one.service, one.messages);
    let mut lines: Vec<String> = resent.iter().map(line).collect();
    let recent: u64 = resent.iter().map(|one| one.recent).sum();
    if recent > 0 {
        lines.push(format!(
            "The broker may drop {recent} of them as duplicates, because they were published within \
             its duplicate window (2 minutes by default). Run the command again after that time."
        ));
    }
    lines.join("\n")
}

pub(crate) fn streams(streams: &[StreamSummary]) -> String {
    let rows = streams.iter().map(|one| {
        vec![
            one.name.clone(),
            one.subjects.join(" "),
            one.messages.to_string(),
            size(one.bytes),
            u64::try_from(one.max_bytes).map_or("-".to_owned(), size),
            one.consumers.to_string(),
            format!("{}-{}", one.first_sequence, one.last_sequence),
            if one.messages == 0 {
                "-".to_owned()
            } else {
                second(one.last_at)
            },
        ]
    });
    table(
        &[
            "stream",
            "subjects",
            "messages",
            "size",
            "max size",
            "consumers",
            "sequences",
            "newest (UTC)",
        ],
        rows,
    )
}

pub(crate) fn consumers(consumers: &[ConsumerSummary]) -> String {
    let rows = consumers.iter().map(|one| {
        vec![
            one.name.clone(),
            one.stream.clone(),
            one.subject.clone(),
            if one.durable { "yes" } else { "no" }.to_owned(),
            one.lag.to_string(),
            one.unacked.to_string(),
            one.redelivered.to_string(),
            one.acked_up_to.to_string(),
        ]
    });
    table(
        &[
            "consumer",
            "stream",
            "subject",
            "durable",
            "lag",
            "unacked",
            "redelivered",
            "acked up to",
        ],
        rows,
    )
}

pub(crate) fn message(message: &StoredMessage) -> String {
    let mut text = format!(
        "#{}  {}  {}",
        message.sequence,
        second(message.stored_at),
        printable(&message.subject)
    );
    for (name, value) in &message.headers {
        text.push_str(&format!("\n    {}: {}", printable(name), printable(value)));
    }
    text.push_str(&format!("\n    {}", printable(&message.body.to_string())));
    text
}

/// Each column is as wide as its widest entry; numbers are aligned to the right.
fn table(names: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let mut lines = vec![
        names
            .iter()
            .map(|name| (*name).to_owned())
            .collect::<Vec<_>>(),
    ];
    lines.extend(rows.map(|row| row.iter().map(|entry| printable(entry)).collect()));
    let width = |column: usize| {
        lines
            .iter()
            .map(|line| line[column].chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..names.len()).map(width).collect();
    let is_number: Vec<bool> = (0..names.len())
        .map(|column| {
            lines.iter().skip(1).all(|line| {
                line[column].starts_with(|c: char| c.is_ascii_digit())
                    && !line[column].contains('-')
            })
        })
        .collect();
    let text = |line: &Vec<String>| {
        let entries = line
            .iter()
            .enumerate()
            .map(|(column, entry)| match is_number[column] {
                true => format!("{entry:>width$}", width = widths[column]),
                false => format!("{entry:<width$}", width = widths[column]),
            });
        entries.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    lines.iter().map(text).collect::<Vec<_>>().join("\n")
}

fn size(bytes: u64) -> String {
    let (divisor, unit) = match bytes {
        0..1024 => return format!("{bytes} B"),
        1024..1_048_576 => (1024.0, "KiB"),
        1_048_576..1_073_741_824 => (1_048_576.0, "MiB"),
        _ => (1_073_741_824.0, "GiB"),
    };
    format!("{:.1} {unit}", bytes as f64 / divisor)
}

fn second(at: OffsetDateTime) -> String {
    at.replace_nanosecond(0)
        .unwrap_or(at)
        .format(&Rfc3339)
        .unwrap_or_default()
}

/// Replaces control characters: a message must not control the operator's terminal.
fn printable(text: &str) -> String {
    text.chars()
        .map(|c| {
            if c.is_control() {
                char::REPLACEMENT_CHARACTER
            } else {
                c
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    #[test]
    fn an_order_is_shown_without_empty_tables_and_values() {
        let tables = json!({
            "decision": { "outcome": "paid", "reason": null },
            "requests": [{ "n": 0, "payload": "{\"amount\":1}" }, { "n": 1, "payload": "{}" }],
            "debits": [],
            "order": null,
        });
        let shown = super::order(&tables);
        let lines: Vec<&str> = shown.lines().collect();
        assert!(
            lines.contains(&"    outcome  paid") && lines.contains(&r#"    payload  {"amount":1}"#),
            "{shown}"
        );
        assert_eq!(
            lines.iter().filter(|line| **line == "requests").count(),
            2,
            "{shown}"
        );
        assert!(shown.find("requests") < shown.find("decision"), "{shown}");
        assert!(
            !shown.contains("reason") && !shown.contains("debits") && !shown.contains("order"),
            "{shown}"
        );
    }
}
