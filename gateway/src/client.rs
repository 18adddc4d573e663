//! Identifies the client of a request by its network address, for the limits.

use std::net::IpAddr;

use axum::http::{HeaderMap, HeaderName};
use service_kit::server::client_network;

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// The client of a request. The request has it in its extensions. For limits it is an opaque key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Client(IpAddr);

impl Client {
    /// `peer` is the remote address of the connection. If it is one of `trusted_proxies`, the
    /// header X-Forwarded-For names the client.
    pub(crate) fn identify(peer: IpAddr, headers: &HeaderMap, trusted_proxies: &[IpAddr]) -> Self {
        Self(client_network(address(peer, headers, trusted_proxies)))
    }
}

fn address(peer: IpAddr, headers: &HeaderMap, trusted_proxies: &[IpAddr]) -> IpAddr {
    if !trusted_proxies.contains(&peer) {
        return peer;
    }
    // Each proxy appends the address of its caller. So the last address that is not a trusted proxy
    // is the client; the client may have forged the addresses before it.
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
    fn only_a_trusted_proxy_can_name_another_client() {
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
            "a client claims to be a proxy"
        );
        assert_eq!(client(proxy, "10.0.0.1", "1.1.1.1"), "1.1.1.1");
        assert_eq!(
            client(proxy, "10.0.0.1", "6.6.6.6, 1.1.1.1"),
            "1.1.1.1",
            "the client claims to forward for another client"
        );
        assert_eq!(
            client(proxy, "10.0.0.1", "6.6.6.6, 1.1.1.1, 10.0.0.2"),
            "1.1.1.1",
            "two trusted proxies"
        );
        assert_eq!(client(proxy, "10.0.0.1", "nonsense"), "10.0.0.1");
    }
}
