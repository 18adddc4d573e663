//! A program with a failpoint, for the test that a release build has none.

fn main() {
    if let Err(injected) = failpoint::failpoint!("relay.after_send") {
        println!("{injected}");
    }
}
