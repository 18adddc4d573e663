//! What the tool found, as text for people.

use std::time::Duration;

use ops::audit::Report;
use ops::dlq::Letter;
use ops::look;
use ops::stream::{ConsumerLook, MessageLook, StreamLook};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// A dead letter on a line.
pub(crate) fn letter(letter: &Letter) -> String {
    let state = if letter.waits { "waits" } else { "sent again" };
    format!(
        "{} {:<8} {:<10} {:<10} {:>3}x {}  {}",
        letter.id, letter.service, letter.kind, state, letter.times, letter.created_at, letter.cause
    )
}

/// Streams and consumers, and whether they are as they should be.
pub(crate) fn topology(parts: &[look::Part]) -> String {
    let mut lines = Vec::new();
    for part in parts {
        let state = match (part.there, part.drift.is_empty()) {
            (false, _) => "absent".to_owned(),
            (true, true) => "as it should be".to_owned(),
            (true, false) => part.drift.join(", "),
        };
        lines.push(format!(
            "{:<33} {:>8} messages {:>6} unacked {:>6} redelivered  {state}",
            part.name, part.messages, part.ack_pending, part.redelivered
        ));
    }
    lines.join("\n")
}

/// How an audit ended.
pub(crate) fn report(report: &Report, took: Duration) -> String {
    let mut text = format!(
        "{} orders ({}), {} decisions, {} transfers, {} accounts in {:.1} s\n",
        report.orders,
        report.by_status.iter().map(|(status, number)| format!("{number} {status}")).collect::<Vec<_>>().join(", "),
        report.decisions,
        report.transfers,
        report.accounts,
        took.as_secs_f64()
    );
    if report.exchanges > 0 {
        text.push_str(&format!("against {} exchanges of a client\n", report.exchanges));
    }
    for finding in &report.findings {
        text.push_str(&format!("  {:<22} {}  {}\n", finding.kind, finding.id, finding.detail));
    }
    text.push_str(&match report.findings.len() {
        0 => "Everything fits together.\n".to_owned(),
        number => format!("{number} findings.\n"),
    });
    text
}

/// What waits to be published.
pub(crate) fn outboxes(outboxes: &[look::Outbox]) -> String {
    let line = |one: &look::Outbox| {
        format!(
            "{:<9} {:>7} wait, the oldest for {:.1} s, tried {} times at most",
            one.service, one.pending, one.oldest_seconds, one.attempts_max
        )
    };
    outboxes.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// What is published again.
pub(crate) fn resent(resent: &[look::Resent], dry_run: bool) -> String {
    let done = if dry_run { "would be published again" } else { "will be published again" };
    let line = |one: &look::Resent| format!("{:<9} {:>7} messages {done}", one.service, one.messages);
    resent.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// The streams.
pub(crate) fn streams(streams: &[StreamLook]) -> String {
    let rows = streams.iter().map(|one| {
        vec![
            one.name.clone(),
            one.subjects.join(" "),
            one.messages.to_string(),
            size(one.bytes),
            u64::try_from(one.max_bytes).map_or("-".to_owned(), size),
            one.consumers.to_string(),
            format!("{}-{}", one.first_sequence, one.last_sequence),
            if one.messages == 0 { "-".to_owned() } else { second(one.last_at) },
        ]
    });
    table(&["stream", "subjects", "messages", "size", "at most", "consumers", "sequences", "newest (UTC)"], rows)
}

/// The consumers.
pub(crate) fn consumers(consumers: &[ConsumerLook]) -> String {
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
    table(&["consumer", "stream", "takes", "durable", "lag", "unacked", "redelivered", "acked up to"], rows)
}

/// A message, with headers and body.
pub(crate) fn message(message: &MessageLook) -> String {
    let mut text = format!("#{}  {}  {}", message.sequence, second(message.stored_at), printable(&message.subject));
    for (name, value) in &message.headers {
        text.push_str(&format!("\n    {}: {}", printable(name), printable(value)));
    }
    text.push_str(&format!("\n    {}", printable(&message.body.to_string())));
    text
}

/// Columns as wide as their widest entry, numbers to the right.
fn table(names: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let mut lines = vec![names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()];
    lines.extend(rows.map(|row| row.iter().map(|entry| printable(entry)).collect()));
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..names.len()).map(width).collect();
    let is_number: Vec<bool> = (0..names.len())
        .map(|column| {
            lines.iter().skip(1).all(|line| line[column].starts_with(|c: char| c.is_ascii_digit()) && !line[column].contains('-'))
        })
        .collect();
    let text = |line: &Vec<String>| {
        let entries = line.iter().enumerate().map(|(column, entry)| match is_number[column] {
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
    at.replace_nanosecond(0).unwrap_or(at).format(&Rfc3339).unwrap_or_default()
}

/// Control characters of a message could do things to the terminal.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}
