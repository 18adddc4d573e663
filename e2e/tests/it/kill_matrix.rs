//! The part of the kill matrix that every test run includes: kill -9 at each failpoint.

use std::process::Command;

#[tokio::test]
async fn f16_f34_every_process_is_killed_at_every_failpoint() {
    let matrix = tokio::task::spawn_blocking(|| {
        Command::new(env!("CARGO_BIN_EXE_kill-matrix"))
            .args(["--action", "kill"])
            .output()
    });
    let output = matrix.await.unwrap().unwrap();
    let words = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{words}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let runs: usize = failpoint::ALL
        .iter()
        .map(|(_, services)| services.len())
        .sum();
    assert!(
        words.contains(&format!("{runs} runs, ")) && words.contains(" 0 failed"),
        "{words}"
    );
}
