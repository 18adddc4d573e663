//! A proxy on every connection between the parts of a stack.

use crate::proxy::{Protocol, Proxy};
use crate::seed::Seed;
use crate::system::System;

/// Client, server and protocol.
const WAYS: [(&str, &str, Protocol); 6] = [
    ("orders", "postgres", Protocol::Postgres),
    ("payments", "postgres", Protocol::Postgres),
    ("orders", "nats", Protocol::Nats),
    ("payments", "nats", Protocol::Nats),
    ("gateway", "orders", Protocol::Plain),
    ("gateway", "payments", Protocol::Plain),
];

/// The proxies of one stack: one between each client and server, and one in front of the gateway.
#[derive(Clone, Debug)]
pub struct Edges {
    ways: Vec<(&'static str, &'static str, Proxy)>,
}

impl Edges {
    /// Opens the proxies. Running services keep their direct connections until they are restarted.
    pub async fn open(system: &mut System, seed: &mut Seed) -> anyhow::Result<Self> {
        let mut ways = Vec::new();
        for (from, to, protocol) in WAYS {
            let proxy = Proxy::open(protocol, system.port(to)?, seed.branch()).await?;
            system.detour(from, to, proxy.port());
            ways.push((from, to, proxy));
        }
        let front = Proxy::open(Protocol::Plain, system.port("gateway")?, seed.branch()).await?;
        ways.push(("client", "gateway", front));
        Ok(Self { ways })
    }

    /// The proxy between two parts, such as `orders` and `postgres`, or `client` and `gateway`.
    ///
    /// # Panics
    /// If there is no such pair.
    pub fn between(&self, from: &str, to: &str) -> &Proxy {
        let found = self.ways.iter().find(|(a, b, _)| (*a, *b) == (from, to));
        &found.expect("the ways are a constant list").2
    }

    /// All proxies.
    pub fn all(&self) -> impl Iterator<Item = &Proxy> {
        self.ways.iter().map(|(_, _, proxy)| proxy)
    }

    /// The proxies in front of one part.
    pub fn to<'a>(&'a self, part: &'a str) -> impl Iterator<Item = &'a Proxy> {
        self.ways
            .iter()
            .filter(move |(_, to, _)| *to == part)
            .map(|(_, _, proxy)| proxy)
    }

    /// The address for clients.
    pub fn front(&self) -> String {
        format!(
            "http://127.0.0.1:{}",
            self.between("client", "gateway").port()
        )
    }
}
