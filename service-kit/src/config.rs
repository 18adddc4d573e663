//! Settings that all binaries share.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

use anyhow::Context as _;
use tokio::net::TcpListener;

/// A password, or a URL that contains one. Its `Debug` prints `***`.
#[derive(Clone)]
pub struct Secret(String);

impl Secret {
    /// The secret value. Do not print it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl From<String> for Secret {
    fn from(value: String) -> Self {
        Self(value)
    }
}

impl FromStr for Secret {
    type Err = std::convert::Infallible;

    fn from_str(value: &str) -> Result<Self, Self::Err> {
        Ok(Self(value.to_owned()))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Opens the HTTP port.
///
/// There is no login, so everyone who can reach the port is an administrator. Therefore an address
/// that other machines can reach is an error, unless `unprotected` is set. Set `unprotected` if
/// something else restricts access: a container publishes the port on loopback only, or a proxy
/// authenticates callers.
pub async fn listen(address: SocketAddr, unprotected: bool) -> anyhow::Result<TcpListener> {
    anyhow::ensure!(
        address.ip().is_loopback() || unprotected,
        "other machines can reach {address}, and there is no login: listen on 127.0.0.1, or set \
         GOZON_LISTEN_UNPROTECTED=true if only trusted callers can reach this port"
    );
    TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address}: is another program using the port?"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_never_shown() {
        let secret: Secret = "postgres://me:hunter2@db/x".parse().unwrap();
        assert_eq!(format!("{secret:?}"), "***");
        assert!(secret.expose().contains("hunter2"));
    }

    #[tokio::test]
    async fn a_non_loopback_address_is_an_error_unless_it_is_allowed() {
        let everywhere: SocketAddr = "0.0.0.0:0".parse().unwrap();
        let refusal = listen(everywhere, false).await.unwrap_err().to_string();
        assert!(refusal.contains("GOZON_LISTEN_UNPROTECTED"), "{refusal}");
        assert!(listen(everywhere, true).await.is_ok());
        assert!(listen("127.0.0.1:0".parse().unwrap(), false).await.is_ok());
    }
}
