//! The subcommand `healthcheck` of each service. It asks the process that runs with the same
//! settings whether it is ready; exit code 0 means yes. So the health check of a container needs no
//! shell and no curl in the image.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use clap::{Command, Parser};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::StatusCode;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use tokio::time::timeout;

const NAME: &str = "healthcheck";
/// Longer than the time limit of the checks in `/readyz`.
const TIMEOUT: Duration = Duration::from_secs(3);
/// Limits the answer, because another program may use the port.
const ANSWER_BYTES_MAX: usize = 16 * 1024;

/// Parses the command line like [`Parser::parse`]. For the subcommand `healthcheck`, runs the check
/// and exits.
pub async fn parse_or_check<C: Parser>() -> C {
    let matches = with_subcommand(C::command()).get_matches();
    if matches.subcommand_matches(NAME).is_some() {
        let listen = *matches
            .get_one("listen")
            .expect("every service has --listen, with a default");
        std::process::exit(match check(listen).await {
            Ok(()) => {
                println!("Ready.");
                0
            }
            Err(why) => {
                eprintln!("Not ready: {why}");
                1
            }
        });
    }
    C::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
}

/// Adds the subcommand. It needs only the address: settings that the service requires, such as
/// passwords, are optional for it.
fn with_subcommand(command: Command) -> Command {
    let about = "Ask the process on --listen whether it is ready; exit code 1 if it is not";
    command
        .subcommand_negates_reqs(true)
        .subcommand(Command::new(NAME).about(about))
}

/// Returns an error with the reason if the process on this address is not ready.
async fn check(listen: SocketAddr) -> Result<(), String> {
    let address = SocketAddr::new(reachable(listen.ip()), listen.port());
    let uri = format!("http://{address}/readyz")
        .parse()
        .expect("an address makes a URI");
    let client = Client::builder(TokioExecutor::new()).build_http::<Empty<Bytes>>();
    let exchange = async {
        let (parts, body) = client.get(uri).await?.into_parts();
        let body = Limited::new(body, ANSWER_BYTES_MAX).collect().await;
        let body = body.map_err(anyhow::Error::from_boxed)?.to_bytes();
        anyhow::Ok((parts.status, body))
    };
    match timeout(TIMEOUT, exchange).await {
        Ok(Ok((StatusCode::OK, _))) => Ok(()),
        Ok(Ok((status, body))) => {
            Err(detail(&body).unwrap_or_else(|| format!("{address} answers {status}")))
        }
        Ok(Err(error)) => Err(format!("{address} does not answer: {error:#}")),
        Err(_) => Err(format!("{address} does not answer within {TIMEOUT:?}")),
    }
}

/// The address to connect to: loopback if the process listens on all addresses.
fn reachable(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        other => other,
    }
}

/// The detail of a problem document.
fn detail(body: &[u8]) -> Option<String> {
    let document: serde_json::Value = serde_json::from_slice(body).ok()?;
    Some(document.get("detail")?.as_str()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::health::Health;
    use crate::server::ConnectionArgs;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
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

    #[tokio::test]
    async fn the_check_reports_whether_the_process_is_ready_and_why_not() {
        // All addresses, as in a container.
        let listener = TcpListener::bind("0.0.0.0:0").await.unwrap();
        let listen = listener.local_addr().unwrap();
        let good = Arc::new(AtomicBool::new(true));
        let seen = good.clone();
        let shutdown = CancellationToken::new();
        let health = Health::default().required("database", move || {
            std::future::ready(if seen.load(Ordering::SeqCst) {
                Ok(())
            } else {
                Err("down".to_owned())
            })
        });
        let router = crate::http::edge(health.routes(shutdown.clone()));
        let server = tokio::spawn(crate::server::serve(
            listener,
            router,
            ConnectionArgs::default(),
            shutdown.clone(),
        ));

        assert_eq!(check(listen).await, Ok(()));
        good.store(false, Ordering::SeqCst);
        let why = check(listen).await.unwrap_err();
        assert!(why.contains("database: down"), "{why}");

        shutdown.cancel();
        server.await.unwrap().unwrap();
        let why = check(listen).await.unwrap_err();
        assert!(why.contains("does not answer"), "{why}");
    }

    #[tokio::test]
    async fn another_program_on_the_port_is_not_ready() {
        for (answer, why) in [
            ("", "does not answer"),
            ("SSH-2.0-OpenSSH_9.2\r\n", "does not answer"),
            (
                "HTTP/1.1 404 Not Found\r\ncontent-length: 4\r\n\r\nnope",
                "answers 404",
            ),
        ] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let other = tokio::spawn(async move {
                let (mut stream, _) = listener.accept().await.unwrap();
                // Reads the whole request: closing with unread bytes would reset the connection.
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    request.push(stream.read_u8().await.unwrap());
                }
                stream.write_all(answer.as_bytes()).await.unwrap();
            });
            let said = check(address).await.unwrap_err();
            assert!(said.contains(why), "{said}");
            other.await.unwrap();
        }
    }
}
