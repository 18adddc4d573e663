//! What a build carries of failpoints and of guards that can be taken away.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails there")]

use std::path::PathBuf;
use std::process::Command;

fn probe(release: bool) -> PathBuf {
    // A folder of its own: cargo holds the lock of the usual one while it runs tests.
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

fn runs_into_it(program: &PathBuf) -> bool {
    let output = Command::new(program)
        .env(failpoint::VARIABLE, "relay.after_send=error")
        .output()
        .unwrap();
    !output.stdout.is_empty()
}

fn takes_away(program: &PathBuf) -> bool {
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
fn a_release_build_has_no_failpoint_and_keeps_its_guards_and_a_debug_build_does_not() {
    let debug = probe(false);
    assert!(
        runs_into_it(&debug)
            && contains(&debug, "relay.after_send")
            && contains(&debug, failpoint::VARIABLE)
    );
    let release = probe(true);
    assert!(
        !runs_into_it(&release),
        "a release build obeys {}",
        failpoint::VARIABLE
    );
    assert!(!contains(&release, "relay.after_send") && !contains(&release, failpoint::VARIABLE));

    assert!(
        takes_away(&debug)
            && contains(&debug, "relay.puback")
            && contains(&debug, failpoint::REMOVED_GUARD)
    );
    assert!(
        !takes_away(&release),
        "a release build obeys {}",
        failpoint::REMOVED_GUARD
    );
    assert!(!contains(&release, "relay.puback") && !contains(&release, failpoint::REMOVED_GUARD));
}
