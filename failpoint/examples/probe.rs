//! A program with a failpoint and a guard. A test checks that its release build contains neither.

fn main() {
    if let Err(injected) = failpoint::failpoint!("relay.after_send") {
        println!("{injected}");
    }
    if failpoint::removed!("relay.puback") {
        println!("without relay.puback");
    }
}
