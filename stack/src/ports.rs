//! Which ports a stack listens on.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::{Context as _, bail};

/// The ports of one stack, all on 127.0.0.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    /// PostgreSQL.
    pub postgres: u16,
    /// NATS.
    pub nats: u16,
    /// The NATS monitor.
    pub nats_monitor: u16,
    /// The gateway.
    pub gateway: u16,
    /// orders.
    pub orders: u16,
    /// payments.
    pub payments: u16,
}

impl Ports {
    /// The well-known ports, `offset` added to each so that several stacks can run side by side.
    pub fn with_offset(offset: u16) -> anyhow::Result<Self> {
        let port = |base: u16| {
            base.checked_add(offset)
                .context("GOZON_PORT_OFFSET is too large: ports end at 65535")
        };
        Ok(Self {
            postgres: port(54320)?,
            nats: port(4222)?,
            nats_monitor: port(8222)?,
            gateway: port(8080)?,
            orders: port(8081)?,
            payments: port(8082)?,
        })
    }

    /// Ports that nobody uses.
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

    /// Says which port another program has taken.
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
            if TcpListener::bind(local(port)).is_err() {
                bail!(
                    "port {port}, for {name}, is taken by another program: stop that one, or set GOZON_PORT_OFFSET=100"
                );
            }
        }
        Ok(())
    }
}

/// `port` on this machine.
pub fn local(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

/// A port that nobody listens on, below those that the system gives to outgoing connections, so that none of these
/// takes it before it is used. Processes start at different places of the range.
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
    bail!("no port from {FIRST} is free")
}
