//! A short chaos run, quick enough for every test run.

use std::process::Command;

#[tokio::test]
async fn a_short_chaos_run_keeps_the_promise() {
    let run = tokio::task::spawn_blocking(|| {
        Command::new(env!("CARGO_BIN_EXE_chaos"))
            .args(["--seed", "1", "--seconds", "40"])
            .output()
    });
    let output = run.await.unwrap().unwrap();
    let words = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{words}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(
        words.contains("The promise is kept, and every kind of fault happened."),
        "{words}"
    );
}
