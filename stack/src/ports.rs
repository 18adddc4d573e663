//! The ports of a stack.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use anyhow::{Context as _, bail};

/// The ports of one stack, all on 127.0.0.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    pub postgres: u16,
    pub nats: u16,
    pub nats_monitor: u16,
    pub gateway: u16,
    pub orders: u16,
    pub payments: u16,
}

impl Ports {
    /// The default ports plus `offset`, so that several stacks can run side by side. The defaults
    /// are below 32768, because Linux uses higher ports for outgoing connections.
    pub fn with_offset(offset: u16) -> anyhow::Result<Self> {
        let port = |base: u16| {
            base.checked_add(offset)
                .context("GOZON_PORT_OFFSET is too large: ports end at 65535")
        };
        Ok(Self {
            postgres: port(15432)?,
            nats: port(4222)?,
            nats_monitor: port(8222)?,
            gateway: port(8080)?,
            orders: port(8081)?,
            payments: port(8082)?,
        })
    }

    /// Ports that no program uses.
    pub fn free() -> anyhow::Result<Self> {
        Ok(Self {
            postgres: free_port()?,
            nats: free_port()?,
            nats_monitor: free_port()?,
            gateway: free_port()?,
            orders: free_port()?,
            payments: free_port()?,
        })
    }

    /// Fails if another program listens on one of the ports. The error names the port.
    pub fn ensure_free(&self) -> anyhow::Result<()> {
        let named = [
            ("postgres", self.postgres),
            ("nats", self.nats),
            ("the NATS monitor", self.nats_monitor),
            ("gateway", self.gateway),
            ("orders", self.orders),
            ("payments", self.payments),
        ];
        for (name, port) in named {
            if is_taken(port) {
                bail!(
                    "port {port} ({name}) is taken by another program: stop that program, or set \
                     GOZON_PORT_OFFSET=100"
                );
            }
        }
        Ok(())
    }
}

pub fn local(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

/// Whether a program listens on the port. A failed `bind` alone does not prove it: `bind` also
/// fails if a closed connection had this local port and is still in TIME_WAIT.
fn is_taken(port: u16) -> bool {
    const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
    if TcpListener::bind(local(port)).is_ok() {
        return false;
    }
    match TcpStream::connect_timeout(&local(port), CONNECT_TIMEOUT) {
        Ok(_) => true,
        // A program listens but does not accept: its backlog is full.
        Err(error) => error.kind() == ErrorKind::TimedOut,
    }
}

/// A port that no program uses. It is below the range of outgoing connections, so no connection
/// takes it before the caller does. Each process starts its search at a different port.
pub fn free_port() -> anyhow::Result<u16> {
    const FIRST: u16 = 10_000;
    const COUNT: u16 = 20_000;
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = u16::try_from(std::process::id() * 97 % u32::from(COUNT)).unwrap_or(0);
    for _ in 0..COUNT {
        let port = FIRST + (start + NEXT.fetch_add(1, Ordering::Relaxed) % COUNT) % COUNT;
        if TcpListener::bind(local(port)).is_ok() {
            return Ok(port);
        }
    }
    bail!("no port from {FIRST} to {} is free", FIRST + COUNT - 1)
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use tokio::net::TcpSocket;

    use super::*;

    #[test]
    fn the_default_ports_are_below_the_ephemeral_range() {
        let ports = Ports::with_offset(0).unwrap();
        for port in [
            ports.postgres,
            ports.nats,
            ports.nats_monitor,
            ports.gateway,
        ] {
            assert!(port < 32768, "{port}");
        }
    }

    #[test]
    fn a_port_is_taken_while_a_program_listens_and_not_after() {
        let port = free_port().unwrap();
        let listener = TcpListener::bind(local(port)).unwrap();
        assert!(is_taken(port));
        drop(listener);
        assert!(!is_taken(port));
    }

    #[tokio::test]
    async fn a_port_in_time_wait_is_not_taken() {
        let server = TcpListener::bind(local(0)).unwrap();
        // The side that closes first keeps its port in TIME_WAIT. Its socket has no SO_REUSEADDR,
        // so `bind` fails.
        let port = free_port().unwrap();
        let client = TcpSocket::new_v4().unwrap();
        client.bind(local(port)).unwrap();
        let client = client.connect(server.local_addr().unwrap()).await.unwrap();
        let (mut accepted, _) = server.accept().unwrap();
        drop(client);
        assert_eq!(accepted.read(&mut [0; 1]).unwrap(), 0);
        drop(accepted);
        assert!(TcpListener::bind(local(port)).is_err());
        assert!(!is_taken(port));
    }
}
