//! `./dev bounty`: removes one guard after the other and runs the test that covers it. The test
//! must pass with the guard and fail without it; a test that passes without it proves nothing. Ends
//! with a summary.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context as _, ensure};
use clap::Parser;
use failpoint::{GUARDS, REMOVED_GUARD};
use serde_json::Value;

/// The test that must fail without each guard: guard, package, name.
const CAUGHT_BY: [(&str, &str, &str); 21] = [
    (
        "place.outbox_row",
        "orders",
        "placing::an_order_is_stored_with_its_event_and_published",
    ),
    (
        "place.idempotency_key",
        "orders",
        "placing::the_same_key_gets_the_first_answer_and_other_content_is_refused",
    ),
    (
        "relay.puback",
        "messaging",
        "relay::f19_a_row_that_the_broker_never_takes_delays_no_other_row",
    ),
    (
        "consumer.ack_after_commit",
        "payments",
        "charging::a_crash_before_the_commit_leaves_nothing_and_the_order_is_debited_after",
    ),
    (
        "consumer.defer",
        "payments",
        "held::f65_a_row_that_is_refused_every_time_delays_no_other",
    ),
    (
        "charge.decision_check",
        "payments",
        "charging::a_redelivered_order_writes_nothing_but_its_counter",
    ),
    (
        "charge.decision_over_inbox",
        "payments",
        "charging::the_decision_guards_even_without_an_inbox_row",
    ),
    (
        "charge.one_decision_in_a_batch",
        "payments",
        "charging::the_same_event_twice_and_two_asks_of_one_order_in_one_batch_are_one_debit",
    ),
    (
        "charge.refusal_stored",
        "payments",
        "charging::f41_a_refusal_stands_even_after_a_top_up",
    ),
    (
        "charge.same_request",
        "payments",
        "poison::f33_another_amount_or_user_for_a_decided_order_is_quarantined",
    ),
    (
        "charge.enough_money",
        "payments",
        "charging::f41_a_refusal_stands_even_after_a_top_up",
    ),
    (
        "charge.re_arm",
        "payments",
        "charging::a_re_ask_is_answered_again_once",
    ),
    (
        "account.lock",
        "payments",
        "accounts::fifty_parallel_deposits_with_fifty_keys_all_count",
    ),
    (
        "deposit.idempotency_key",
        "payments",
        "accounts::f41_a_retried_deposit_adds_once",
    ),
    (
        "payments.append_only",
        "payments",
        "charging::money_rows_cannot_be_changed_or_deleted",
    ),
    (
        "settle.status_guard",
        "orders",
        "settling::a_repeated_answer_changes_nothing_and_publishes_nothing",
    ),
    (
        "settle.same_content",
        "orders",
        "settling::f33_an_answer_that_contradicts_is_quarantined_and_changes_nothing",
    ),
    (
        "orders.final",
        "orders",
        "settling::a_final_order_cannot_be_changed_and_no_order_deleted",
    ),
    (
        "reconcile.ask_again",
        "orders",
        "reconciling::an_order_without_an_answer_is_re_asked_under_new_numbers",
    ),
    (
        "reconcile.lost_at",
        "orders",
        "reconciling::when_the_broker_comes_back_empty_every_new_order_is_due_at_once",
    ),
    (
        "reconcile.fresh_message_id",
        "orders",
        "reconciling::an_order_without_an_answer_is_re_asked_under_new_numbers",
    ),
];

/// Removes one guard after the other. Each time, the test that covers it must fail.
#[derive(Parser)]
struct Arguments {
    /// Only guards whose name contains this.
    #[arg(default_value = "")]
    only: String,
}

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let chosen: Vec<_> = CAUGHT_BY
        .iter()
        .filter(|(guard, _, _)| guard.contains(&arguments.only))
        .collect();
    ensure!(
        !chosen.is_empty(),
        "no guard has a name that contains {:?}",
        arguments.only
    );

    let programs = Programs::build()?;
    println!("Every test with all guards in place:");
    let tests: BTreeSet<(&str, &str)> = chosen
        .iter()
        .map(|(_, package, test)| (*package, *test))
        .collect();
    for (package, test) in &tests {
        let run = programs.run(package, test, None)?;
        println!(
            "  {:<6} {:>5.1} s  {package} {test}",
            if run.passed { "passes" } else { "FAILS" },
            run.seconds
        );
        ensure!(
            run.passed,
            "{test} fails although no guard is removed:\n{}",
            run.why
        );
    }

    println!("\nEach test with its guard removed:");
    let mut missed = 0;
    for (guard, package, test) in &chosen {
        let run = programs.run(package, test, Some(guard))?;
        let what = GUARDS
            .iter()
            .find(|(name, _)| name == guard)
            .map_or("", |(_, what)| what);
        let verdict = if run.passed { "MISSED" } else { "caught" };
        println!("  {verdict} {:>5.1} s  {guard:<31} {what}", run.seconds);
        println!(
            "  {:>17}by {package} {test}: {}",
            "",
            if run.passed { "it passes" } else { &run.why }
        );
        missed += usize::from(run.passed);
    }
    println!(
        "\n{} guards removed, {} caught, {missed} missed.",
        chosen.len(),
        chosen.len() - missed
    );
    Ok(if missed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

struct Run {
    passed: bool,
    /// The failure message.
    why: String,
    seconds: f32,
}

/// The integration tests of each package, as `./dev test` builds them: the program, and the folder
/// to run it in.
struct Programs(BTreeMap<String, (PathBuf, PathBuf)>);

impl Programs {
    fn build() -> anyhow::Result<Self> {
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.args([
            "test",
            "--locked",
            "--workspace",
            "--test",
            "it",
            "--no-run",
            "--message-format=json",
        ]);
        let output = cargo
            .stderr(Stdio::inherit())
            .output()
            .context("cargo cannot be run")?;
        ensure!(output.status.success(), "the tests cannot be built");
        let mut programs = BTreeMap::new();
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            let artifact: Value = serde_json::from_str(line)?;
            let manifest = artifact["manifest_path"]
                .as_str()
                .map(Path::new)
                .and_then(Path::parent);
            if let (Some(program), Some(folder)) = (artifact["executable"].as_str(), manifest)
                && artifact["target"]["name"] == "it"
                && let Some(package) = folder.file_name()
            {
                programs.insert(
                    package.to_string_lossy().into_owned(),
                    (program.into(), folder.to_owned()),
                );
            }
        }
        Ok(Self(programs))
    }

    /// Runs one test. Anything but one passed or one failed test is an error: a test that did not
    /// run proves nothing.
    fn run(&self, package: &str, test: &str, removed: Option<&str>) -> anyhow::Result<Run> {
        let begun = Instant::now();
        let (program, folder) = self
            .0
            .get(package)
            .with_context(|| format!("{package} has no tests"))?;
        let mut command = Command::new(program);
        command
            .args(["--exact", test])
            .current_dir(folder)
            .env_remove(REMOVED_GUARD)
            .env("RUST_BACKTRACE", "0");
        if let Some(guard) = removed {
            command.env(REMOVED_GUARD, guard);
        }
        let output = command
            .output()
            .with_context(|| format!("{} cannot be run", program.display()))?;
        let text = format!(
            "{}\n{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        let passed = text.contains("test result: ok. 1 passed; 0 failed");
        let failed = text.contains("test result: FAILED. 0 passed; 1 failed");
        ensure!(
            passed != failed && passed == output.status.success(),
            "{test} did not run:\n{text}"
        );
        Ok(Run {
            passed,
            why: why(&text),
            seconds: begun.elapsed().as_secs_f32(),
        })
    }
}

/// The panic message in one line.
fn why(output: &str) -> String {
    let message: Vec<&str> = output
        .lines()
        .skip_while(|line| !(line.starts_with("thread '") && line.contains("panicked at")))
        .skip(1)
        .take_while(|line| !line.is_empty() && !line.starts_with("note:"))
        .map(str::trim)
        .collect();
    message.join(" ").chars().take(160).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_guard_has_a_test() {
        let guards: Vec<&str> = GUARDS.iter().map(|(name, _)| *name).collect();
        let caught: Vec<&str> = CAUGHT_BY.iter().map(|(name, _, _)| *name).collect();
        assert_eq!(guards, caught);
    }

    #[test]
    fn every_listed_test_exists() {
        let tests = e2e::test_names::all().unwrap();
        for (guard, package, path) in CAUGHT_BY {
            assert!(
                tests
                    .iter()
                    .any(|test| test.package == package && test.path == path),
                "{guard} is covered by {package} {path}, which does not exist"
            );
        }
    }
}
