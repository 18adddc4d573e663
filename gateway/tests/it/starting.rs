//! What is said to whoever starts it wrongly.

use std::process::Command;

#[test]
fn a_wrong_setting_is_told_in_one_line_without_a_backtrace() {
    let output = Command::new(env!("CARGO_BIN_EXE_gateway"))
        .args(["--listen=127.0.0.1:0", "--orders-url=https://orders.example"])
        .env("RUST_BACKTRACE", "1")
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(said, "Error: GOZON_ORDERS_URL: https://orders.example/ must look like http://host:port\n");
    assert_eq!(output.status.code(), Some(1));
}
