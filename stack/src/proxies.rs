//! One proxy for each connection between two parts of a stack, and one in front of the gateway.

use crate::proxy::{Protocol, Proxy};
use crate::seed::Seed;
use crate::system::System;

/// The connections that get a proxy: client, server and protocol.
const CONNECTIONS: [(&str, &str, Protocol); 6] = [
    ("orders", "postgres", Protocol::Postgres),
    ("payments", "postgres", Protocol::Postgres),
    ("orders", "nats", Protocol::Nats),
    ("payments", "nats", Protocol::Nats),
    ("gateway", "orders", Protocol::Plain),
    ("gateway", "payments", Protocol::Plain),
];

/// The proxies of one stack.
#[derive(Clone, Debug)]
pub struct Proxies {
    proxies: Vec<(&'static str, &'static str, Proxy)>,
}

impl Proxies {
    /// Opens the proxies. Services connect through them from their next start on.
    pub async fn open(system: &mut System, seed: &mut Seed) -> anyhow::Result<Self> {
        let mut proxies = Vec::new();
        for (from, to, protocol) in CONNECTIONS {
            let proxy = Proxy::open(protocol, system.port(to)?, seed.fork()).await?;
            system.redirect(from, to, proxy.port());
            proxies.push((from, to, proxy));
        }
        let front = Proxy::open(Protocol::Plain, system.port("gateway")?, seed.fork()).await?;
        proxies.push(("client", "gateway", front));
        Ok(Self { proxies })
    }

    /// The proxy between two parts, such as `orders` and `postgres`, or `client` and `gateway`.
    ///
    /// # Panics
    /// If there is no such pair.
    pub fn between(&self, from: &str, to: &str) -> &Proxy {
        let found = self.proxies.iter().find(|(a, b, _)| (*a, *b) == (from, to));
        &found.expect("no proxy between these two parts").2
    }

    pub fn all(&self) -> impl Iterator<Item = &Proxy> {
        self.proxies.iter().map(|(_, _, proxy)| proxy)
    }

    /// The proxies in front of one part.
    pub fn to<'a>(&'a self, part: &'a str) -> impl Iterator<Item = &'a Proxy> {
        self.proxies
            .iter()
            .filter(move |(_, to, _)| *to == part)
            .map(|(_, _, proxy)| proxy)
    }

    /// The URL of the gateway for clients, through the proxy.
    pub fn client_url(&self) -> String {
        format!(
            "http://127.0.0.1:{}",
            self.between("client", "gateway").port()
        )
    }
}
