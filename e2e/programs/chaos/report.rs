//! The result of a chaos run, as text and as JSON.

use std::collections::BTreeMap;
use std::fmt;
use std::process::Command;
use std::time::Duration;

use e2e::load::Counts;
use ops::audit::{self, FindingKind};
use ops::history::History;
use serde::Serialize;

use crate::settings::{SETTLE_WITHIN, Settings};

#[derive(Clone, Debug, Serialize)]
pub(crate) struct Report {
    /// The command that repeats the run.
    pub(crate) command: String,
    /// The commit of the source.
    pub(crate) commit: String,
    pub(crate) seed: u64,
    pub(crate) seconds: f64,
    /// Orders sent, and those answered with 2xx.
    pub(crate) orders: [u64; 2],
    /// Deposits sent, and those answered with 2xx.
    pub(crate) deposits: [u64; 2],
    pub(crate) exchanges: u64,
    /// Requests by status; `none` for no answer.
    pub(crate) answers: BTreeMap<String, u64>,
    /// Requests with an unknown outcome, which were retried.
    pub(crate) unknown: u64,
    /// How often each kind of fault happened.
    pub(crate) faults: BTreeMap<String, u64>,
    /// Orders by status at the end.
    pub(crate) by_status: BTreeMap<String, u64>,
    /// From the last fault until every order was final.
    pub(crate) settled_after_seconds: Option<f64>,
    /// Findings of the audit by kind.
    pub(crate) findings: BTreeMap<String, u64>,
    pub(crate) first_findings: Vec<String>,
    /// Why the promise was broken or the run proves nothing. Empty if the promise was kept.
    pub(crate) failures: Vec<String>,
}

impl Report {
    #[expect(
        clippy::too_many_arguments,
        reason = "called once, with everything that is known"
    )]
    pub(crate) fn new(
        settings: &Settings,
        counts: Counts,
        history: &History,
        fired: BTreeMap<&'static str, u64>,
        unexpected_ends: &[String],
        audited: audit::Report,
        settled_after: Option<Duration>,
        took: Duration,
    ) -> Self {
        let mut answers: BTreeMap<String, u64> = BTreeMap::new();
        let mut done: [std::collections::BTreeSet<&str>; 2] = Default::default();
        let mut unknown = 0;
        for exchange in &history.exchanges {
            *answers
                .entry(
                    exchange
                        .status
                        .map_or_else(|| "none".to_owned(), |status| status.to_string()),
                )
                .or_default() += 1;
            if exchange.method != "POST" {
                continue;
            }
            unknown += u64::from(exchange.status.is_none_or(|status| status >= 500));
            if let (Some(200..300), Some(key)) = (exchange.status, exchange.key.as_deref()) {
                if key.starts_with("order-") {
                    done[0].insert(key);
                } else if key.starts_with("deposit-") {
                    done[1].insert(key);
                }
            }
        }
        let mut findings: BTreeMap<String, u64> = BTreeMap::new();
        for finding in &audited.findings {
            *findings.entry(finding.kind.to_string()).or_default() += 1;
        }
        let done = done.map(|keys| keys.len() as u64);
        let mut failures: Vec<String> = findings
            .iter()
            .map(|(kind, number)| format!("{number} {kind}"))
            .collect();
        if settled_after.is_none() {
            failures.push(format!(
                "not every order was final {SETTLE_WITHIN:?} after the last fault"
            ));
        }
        for (what, wanted, done) in [
            ("orders", counts.orders_begun, done[0]),
            ("deposits", counts.deposits_begun, done[1]),
        ] {
            if done != wanted {
                failures.push(format!(
                    "{done} of {wanted} {what} were answered with 2xx in the end"
                ));
            }
        }
        for status in ["429", "500"] {
            if let Some(number) = answers.get(status) {
                failures.push(format!("{number} requests were answered with {status}"));
            }
        }
        failures.extend(unexpected_ends.iter().cloned());
        failures.extend(
            audited
                .not_looked_at
                .iter()
                .map(|what| format!("not checked: {what}")),
        );
        failures.extend(
            fired
                .iter()
                .filter(|(_, times)| **times == 0)
                .map(|(name, _)| format!("never happened: {name}")),
        );
        Self {
            command: format!(
                "./dev chaos --seed {} --seconds {} --orders {} --deposits {}",
                settings.seed, settings.seconds, settings.orders, settings.deposits
            ),
            commit: commit(),
            seed: settings.seed,
            seconds: took.as_secs_f64(),
            orders: [counts.orders_begun, done[0]],
            deposits: [counts.deposits_begun, done[1]],
            exchanges: history.exchanges.len() as u64,
            answers,
            unknown,
            faults: fired
                .into_iter()
                .map(|(name, times)| (name.to_owned(), times))
                .collect(),
            by_status: audited.by_status.clone(),
            settled_after_seconds: settled_after.map(|time| time.as_secs_f64()),
            findings,
            first_findings: audited
                .findings
                .iter()
                .take(20)
                .map(|finding| format!("{} {}: {}", finding.kind, finding.id, finding.detail))
                .collect(),
            failures,
        }
    }

    /// Whether the promise was kept and every kind of fault happened.
    pub(crate) fn holds(&self) -> bool {
        self.failures.is_empty()
    }

    fn found(&self, kinds: &[FindingKind]) -> u64 {
        kinds
            .iter()
            .filter_map(|kind| self.findings.get(&kind.to_string()))
            .sum()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |map: &BTreeMap<String, u64>| {
            map.iter()
                .map(|(name, number)| format!("{number} {name}"))
                .collect::<Vec<_>>()
                .join(", ")
        };
        writeln!(f, "# Chaos, seed {}\n", self.seed)?;
        writeln!(
            f,
            "`{}` at commit {}, {:.0} s.\n",
            self.command, self.commit, self.seconds
        )?;
        let [wanted, done] = self.orders;
        let [wanted_deposits, done_deposits] = self.deposits;
        writeln!(f, "| figure | |\n|---|---|")?;
        writeln!(
            f,
            "| orders answered with 2xx in the end | {done} of {wanted} |"
        )?;
        writeln!(f, "| deposits | {done_deposits} of {wanted_deposits} |")?;
        writeln!(
            f,
            "| requests | {} (status: {}) |",
            self.exchanges,
            list(&self.answers)
        )?;
        writeln!(
            f,
            "| requests with an unknown outcome, retried under their keys | {} |",
            self.unknown
        )?;
        writeln!(f, "| orders at the end | {} |", list(&self.by_status))?;
        let settled = self
            .settled_after_seconds
            .map_or_else(|| "never".to_owned(), |time| format!("{time:.1} s"));
        writeln!(
            f,
            "| time from the last fault until every order was final | {settled} |"
        )?;
        writeln!(
            f,
            "| lost | {} |",
            self.found(&[FindingKind::Lost, FindingKind::MissingEvent])
        )?;
        writeln!(
            f,
            "| doubled | {} |",
            self.found(&[FindingKind::DoubledDebit, FindingKind::DoubledKey])
        )?;
        writeln!(
            f,
            "| unexpected | {} |",
            self.found(&[FindingKind::Unexpected])
        )?;
        writeln!(
            f,
            "| stuck | {} |",
            self.found(&[
                FindingKind::Stuck,
                FindingKind::NotApplied,
                FindingKind::Quarantined,
                FindingKind::LatePublication
            ])
        )?;
        writeln!(
            f,
            "| drift | {} |",
            self.found(&[
                FindingKind::BalanceDrift,
                FindingKind::BrokenStatement,
                FindingKind::NegativeBalance
            ])
        )?;
        writeln!(
            f,
            "| findings of the audit, total | {} |",
            self.findings.values().sum::<u64>()
        )?;
        writeln!(f, "\n| fault | times |\n|---|---|")?;
        for (name, times) in &self.faults {
            writeln!(f, "| {name} | {times} |")?;
        }
        let total = |word: &str| -> u64 {
            self.faults
                .iter()
                .filter(|(name, _)| name.contains(word))
                .map(|(_, times)| times)
                .sum()
        };
        writeln!(
            f,
            "\n{} faults, including {} kills of single processes.",
            self.faults.values().sum::<u64>(),
            total("kill -9")
        )?;
        if self.holds() {
            return writeln!(
                f,
                "\nThe promise is kept, and every kind of fault happened."
            );
        }
        writeln!(f, "\nThe promise is BROKEN, or the run proves nothing:\n")?;
        for failure in self.failures.iter().chain(&self.first_findings) {
            writeln!(f, "- {failure}")?;
        }
        Ok(())
    }
}

fn commit() -> String {
    let output = Command::new("git")
        .args(["rev-parse", "--short", "HEAD"])
        .output();
    let text = output
        .ok()
        .filter(|output| output.status.success())
        .map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    text.unwrap_or_else(|| "unknown".to_owned())
}
