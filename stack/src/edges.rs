//! A proxy on every way between the parts of a stack.

use crate::proxy::{Protocol, Proxy};
use crate::seed::Seed;
use crate::system::System;

/// Who talks to whom.
const WAYS: [(&str, &str, Protocol); 6] = [
    ("orders", "postgres", Protocol::Postgres),
    ("payments", "postgres", Protocol::Postgres),
    ("orders", "nats", Protocol::Nats),
    ("payments", "nats", Protocol::Nats),
    ("gateway", "orders", Protocol::Plain),
    ("gateway", "payments", Protocol::Plain),
];

/// All ways of one stack, and the way of clients to its gateway.
#[derive(Clone, Debug)]
pub struct Edges {
    ways: Vec<(&'static str, &'static str, Proxy)>,
}

impl Edges {
    /// Puts a proxy on each way. Services that run already keep their old ways until they are started again.
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

    /// The way between two parts, such as `orders` and `postgres`, or `client` and `gateway`.
    ///
    /// # Panics
    /// If there is no such way.
    pub fn between(&self, from: &str, to: &str) -> &Proxy {
        let found = self.ways.iter().find(|(a, b, _)| (*a, *b) == (from, to));
        &found.expect("the ways are a constant list").2
    }

    /// Every way.
    pub fn all(&self) -> impl Iterator<Item = &Proxy> {
        self.ways.iter().map(|(_, _, proxy)| proxy)
    }

    /// The ways to one part.
    pub fn to<'a>(&'a self, part: &'a str) -> impl Iterator<Item = &'a Proxy> {
        self.ways
            .iter()
            .filter(move |(_, to, _)| *to == part)
            .map(|(_, _, proxy)| proxy)
    }

    /// Where clients go.
    pub fn front(&self) -> String {
        format!(
            "http://127.0.0.1:{}",
            self.between("client", "gateway").port()
        )
    }
}
