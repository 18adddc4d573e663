//! Only debug builds contain failpoints and removable guards.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::path::PathBuf;
use std::process::Command;

fn probe(release: bool) -> PathBuf {
    // A separate folder, because cargo locks the usual one while it runs tests.
    let target = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("probe");
    let mut cargo = Command::new(env!("CARGO"));
    cargo
        .args([
            "build",
            "--quiet",
            "--locked",
            "--package",
            "failpoint",
            "--example",
            "probe",
            "--target-dir",
        ])
        .arg(&target);
    if release {
        cargo.arg("--release");
    }
    assert!(
        cargo
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .status()
            .unwrap()
            .success()
    );
    target
        .join(if release { "release" } else { "debug" })
        .join("examples/probe")
}

fn failpoint_fires(program: &PathBuf) -> bool {
    let output = Command::new(program)
        .env(failpoint::VARIABLE, "relay.after_send=error")
        .output()
        .unwrap();
    !output.stdout.is_empty()
}

fn guard_is_removed(program: &PathBuf) -> bool {
    let output = Command::new(program)
        .env(failpoint::REMOVED_GUARD, "relay.puback")
        .output()
        .unwrap();
    !output.stdout.is_empty()
}

fn contains(program: &PathBuf, text: &str) -> bool {
    std::fs::read(program)
        .unwrap()
        .windows(text.len())
        .any(|window| window == text.as_bytes())
}

#[test]
fn only_a_debug_build_has_failpoints_and_removable_guards() {
    let debug = probe(false);
    assert!(
        failpoint_fires(&debug)
            && contains(&debug, "relay.after_send")
            && contains(&debug, failpoint::VARIABLE)
    );
    let release = probe(true);
    assert!(
        !failpoint_fires(&release),
        "a release build obeys {}",
        failpoint::VARIABLE
    );
    assert!(!contains(&release, "relay.after_send") && !contains(&release, failpoint::VARIABLE));

    assert!(
        guard_is_removed(&debug)
            && contains(&debug, "relay.puback")
            && contains(&debug, failpoint::REMOVED_GUARD)
    );
    assert!(
        !guard_is_removed(&release),
        "a release build obeys {}",
        failpoint::REMOVED_GUARD
    );
    assert!(!contains(&release, "relay.puback") && !contains(&release, failpoint::REMOVED_GUARD));
}
