//! The demo ends with the expected result.

use std::process::Command;

#[test]
fn the_demo_ends_with_every_order_final_and_every_balance_exact() {
    let output = Command::new(env!("CARGO_BIN_EXE_demo")).output().unwrap();
    let story = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{story}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(
        story.contains("20 final, 15 debits, 0 twice, balances exact."),
        "{story}"
    );
}
