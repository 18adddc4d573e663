//! A TCP load balancer between the gateway and the replicas of a service.

use stack::ports::{free_port, local};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};

/// Forwards each new connection to the next replica that accepts it, until the program ends.
/// Returns the port.
pub(crate) async fn open(replicas: [u16; 2]) -> anyhow::Result<u16> {
    let port = free_port()?;
    let listener = TcpListener::bind(local(port)).await?;
    tokio::spawn(async move {
        for turn in 0_usize.. {
            // An error here is about the client's connection; the client sees it too.
            let Ok((mut client, _)) = listener.accept().await else {
                continue;
            };
            tokio::spawn(async move {
                // If no replica accepts, the client's connection is closed.
                if let Some(mut replica) = connect(replicas, turn).await {
                    // An error ends both connections, and both sides see that.
                    let _ = copy_bidirectional(&mut client, &mut replica).await;
                }
            });
        }
    });
    Ok(port)
}

async fn connect(replicas: [u16; 2], turn: usize) -> Option<TcpStream> {
    for attempt in 0..replicas.len() {
        let port = replicas[(turn + attempt) % replicas.len()];
        if let Ok(stream) = TcpStream::connect(local(port)).await {
            return Some(stream);
        }
    }
    None
}
