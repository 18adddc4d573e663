//! `orders healthcheck`: asks the process that runs with the same settings whether it is ready, and says so with the exit
//! code. A container knows with it how it is, without a shell or curl in its image.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::time::Duration;

use clap::{Command, Parser};

const NAME: &str = "healthcheck";
/// Longer than `/readyz` waits for its probes.
const TIMEOUT: Duration = Duration::from_secs(3);
/// The answer is a few lines; whoever else sits on the port may say more.
const ANSWER_BYTES_MAX: u64 = 16 * 1024;

/// As [`Parser::parse`]; but the subcommand `healthcheck` ends the process here, with 0 if the other one is ready.
pub fn parse_or_check<C: Parser>() -> C {
    let matches = with_subcommand(C::command()).get_matches();
    if matches.subcommand_matches(NAME).is_some() {
        let listen = *matches
            .get_one("listen")
            .expect("every service has --listen, with a default");
        std::process::exit(match check(listen) {
            Ok(()) => {
                println!("It is ready.");
                0
            }
            Err(why) => {
                eprintln!("It is not ready: {why}");
                1
            }
        });
    }
    C::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
}

/// The check needs the address and nothing else that is required, passwords least of all.
fn with_subcommand(command: Command) -> Command {
    let about = "Asks the process on --listen whether it is ready; exit code 1 if it is not";
    command
        .subcommand_negates_reqs(true)
        .subcommand(Command::new(NAME).about(about))
}

/// Whether the process that was told to listen on this address is ready; if not, why.
pub fn check(listen: SocketAddr) -> Result<(), String> {
    let address = SocketAddr::new(from_here(listen.ip()), listen.port());
    let answer = ask(address).map_err(|error| format!("{address} does not answer: {error}"))?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    match head.split_ascii_whitespace().nth(1) {
        Some("200") => Ok(()),
        Some(status) => {
            Err(detail(body).unwrap_or_else(|| format!("{address} answers with status {status}")))
        }
        None => Err(format!("what {address} answers is no HTTP")),
    }
}

/// Where a process on the same machine reaches it: "all addresses" is no address to connect to.
fn from_here(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        other => other,
    }
}

fn ask(address: SocketAddr) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    // Version 1.0: the server closes the connection after the answer and does not cut it into chunks.
    write!(stream, "GET /readyz HTTP/1.0\r\nHost: {address}\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// What a problem document says.
fn detail(body: &str) -> Option<String> {
    let document: serde_json::Value = serde_json::from_str(body).ok()?;
    Some(document.get("detail")?.as_str()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::health::Health;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use tokio::net::TcpListener;
    use tokio_util::sync::CancellationToken;

    #[derive(clap::Parser)]
    struct Config {
        #[arg(long, default_value = "127.0.0.1:8081")]
        listen: SocketAddr,
        #[arg(long)]
        password: String,
    }

    #[test]
    fn the_check_needs_no_password_but_the_service_does() {
        let parse = |arguments: &[&str]| {
            with_subcommand(<Config as clap::CommandFactory>::command())
                .try_get_matches_from(arguments)
        };
        let matches = parse(&["orders", "--listen", "0.0.0.0:1", NAME]).unwrap();
        assert_eq!(matches.subcommand_name(), Some(NAME));
        assert_eq!(
            matches.get_one("listen"),
            Some(&SocketAddr::from(([0, 0, 0, 0], 1)))
        );
        assert!(parse(&["orders"]).is_err());

        let config = <Config as clap::FromArgMatches>::from_arg_matches(
            &parse(&["orders", "--password", "x"]).unwrap(),
        )
        .unwrap();
        assert_eq!(
            (config.listen.port(), config.password.as_str()),
            (8081, "x")
        );
    }

    async fn checked(listen: SocketAddr) -> Result<(), String> {
        tokio::task::spawn_blocking(move || check(listen))
            .await
            .unwrap()
    }

    #[tokio::test]
    async fn the_check_says_what_the_process_says_of_itself() {
        // On all addresses, as in a container.
        let listener = TcpListener::bind("0.0.0.0:0").await.unwrap();
        let listen = listener.local_addr().unwrap();
        let good = Arc::new(AtomicBool::new(true));
        let seen = good.clone();
        let shutdown = CancellationToken::new();
        let health = Health::default().required("database", move || {
            std::future::ready(if seen.load(Ordering::SeqCst) {
                Ok(())
            } else {
                Err("away".to_owned())
            })
        });
        let router = crate::http::edge(health.routes(shutdown.clone()));
        let server = tokio::spawn(crate::server::serve(listener, router, shutdown.clone()));

        assert_eq!(checked(listen).await, Ok(()));
        good.store(false, Ordering::SeqCst);
        let why = checked(listen).await.unwrap_err();
        assert!(why.contains("database: away"), "{why}");

        shutdown.cancel();
        server.await.unwrap().unwrap();
        let why = checked(listen).await.unwrap_err();
        assert!(why.contains("does not answer"), "{why}");
    }

    #[test]
    fn what_is_no_answer_of_ours_is_not_ready() {
        for (answer, why) in [
            ("", "no HTTP"),
            ("HTTP/1.1 404 Not Found\r\n\r\nnope", "status 404"),
        ] {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap();
            let other = std::thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                // All of the request: closing on unread bytes would reset the connection.
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    let mut byte = [0];
                    stream.read_exact(&mut byte).unwrap();
                    request.extend(byte);
                }
                stream.write_all(answer.as_bytes()).unwrap();
            });
            let said = check(address).unwrap_err();
            assert!(said.contains(why), "{said}");
            other.join().unwrap();
        }
    }
}
