//! Who sends a request: the address by which its share of the limits is counted.

use std::net::IpAddr;

use axum::http::{HeaderMap, HeaderName};
use service_kit::server::client_network;

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// The client of a request, in the request's extensions. Limits treat it as an opaque key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Client(IpAddr);

impl Client {
    /// `peer` is the other end of the connection. Only `trusted_proxies` can name another client.
    pub(crate) fn identify(peer: IpAddr, headers: &HeaderMap, trusted_proxies: &[IpAddr]) -> Self {
        Self(client_network(address(peer, headers, trusted_proxies)))
    }
}

fn address(peer: IpAddr, headers: &HeaderMap, trusted_proxies: &[IpAddr]) -> IpAddr {
    if !trusted_proxies.contains(&peer) {
        return peer;
    }
    // Each proxy appends the address of its caller, so only addresses after the last untrusted one are certain.
    let named: Vec<&str> = headers
        .get_all(FORWARDED_FOR)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|list| list.split(','))
        .collect();
    let mut last = peer;
    for name in named.into_iter().rev() {
        let Ok(address) = name.trim().parse() else {
            break;
        };
        last = address;
        if !trusted_proxies.contains(&address) {
            break;
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_trusted_proxy_says_who_the_client_is() {
        let client = |proxies: &[&str], peer: &str, header: &str| {
            let proxies: Vec<IpAddr> = proxies.iter().map(|proxy| proxy.parse().unwrap()).collect();
            let mut headers = HeaderMap::new();
            headers.insert(FORWARDED_FOR, header.parse().unwrap());
            address(peer.parse().unwrap(), &headers, &proxies).to_string()
        };
        let (nobody, proxy) = ([].as_slice(), ["10.0.0.1", "10.0.0.2"].as_slice());
        assert_eq!(client(nobody, "10.0.0.1", "1.1.1.1"), "10.0.0.1");
        assert_eq!(
            client(proxy, "9.9.9.9", "1.1.1.1"),
            "9.9.9.9",
            "a stranger claims to be a proxy"
        );
        assert_eq!(client(proxy, "10.0.0.1", "1.1.1.1"), "1.1.1.1");
        assert_eq!(
            client(proxy, "10.0.0.1", "6.6.6.6, 1.1.1.1"),
            "1.1.1.1",
            "the client claims to be a proxy of another"
        );
        assert_eq!(
            client(proxy, "10.0.0.1", "6.6.6.6, 1.1.1.1, 10.0.0.2"),
            "1.1.1.1",
            "two proxies of ours"
        );
        assert_eq!(client(proxy, "10.0.0.1", "nonsense"), "10.0.0.1");
    }
}
