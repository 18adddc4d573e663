//! A proxy that simulates a faulty network between a client and a server: it can delay bytes, cut
//! or black-hole connections, or lose exactly one message. For unencrypted connections on this
//! machine.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};

use crate::ports::local;
use crate::seed::Seed;

mod nats;
mod postgres;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// The protocol of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// Parsed as far as needed to cut at COMMIT.
    Postgres,
    /// Parsed as far as needed to lose acks.
    Nats,
    /// Not parsed.
    Plain,
}

/// A message that the proxy loses the next time it sees one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cut {
    /// The server commits a transaction. Its answer and the connection are lost.
    CommitAnswer {
        /// Text that a statement of the transaction must contain; empty for any transaction.
        after: &'static str,
    },
    /// COMMIT and the connection are lost on the way to the server, so the server rolls back. The
    /// client cannot tell this from [`Self::CommitAnswer`].
    CommitRequest {
        /// As in [`Cut::CommitAnswer`].
        after: &'static str,
    },
    /// The broker stores a message. Its answer is lost.
    PubAck,
    /// The ack of a consumer is lost.
    Ack,
    /// A message is lost on the way to a consumer.
    Delivery,
}

/// The armed cuts, and how often each one fired.
#[derive(Debug, Default)]
struct Cuts(Mutex<(Vec<Cut>, BTreeMap<Cut, u64>)>);

impl Cuts {
    fn arm(&self, cut: Cut, times: usize) {
        self.with(|(armed, _)| armed.extend(std::iter::repeat_n(cut, times)));
    }

    fn take(&self, matches: impl Fn(&Cut) -> bool) -> bool {
        self.with(|(armed, fired)| match armed.iter().position(matches) {
            Some(index) => {
                *fired.entry(armed.swap_remove(index)).or_default() += 1;
                true
            }
            None => false,
        })
    }

    fn fired(&self, cut: Cut) -> u64 {
        self.with(|(_, fired)| fired.get(&cut).copied().unwrap_or_default())
    }

    fn armed(&self) -> usize {
        self.with(|(armed, _)| armed.len())
    }

    fn with<T>(&self, change: impl FnOnce(&mut (Vec<Cut>, BTreeMap<Cut, u64>)) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What clients sent through a proxy since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Statements for PostgreSQL.
    pub statements: u64,
    /// How often a client waited for an answer of PostgreSQL.
    pub round_trips: u64,
    /// Messages for the broker, including acks and requests.
    pub messages: u64,
    /// The size of these messages, including headers.
    pub message_bytes: u64,
}

#[derive(Debug, Default)]
struct Meter(Mutex<Traffic>);

impl Meter {
    fn count(&self, count: impl FnOnce(&mut Traffic)) {
        count(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    ToServer,
    ToClient,
}

/// What to do with the bytes that were read.
enum Action {
    Forward(Bytes),
    ForwardThenCut(Bytes),
}

/// The faults that are active now.
#[derive(Clone, Copy, Debug, Default)]
struct Faults {
    /// The maximum delay of each chunk.
    delay: Duration,
    /// The maximum size of a chunk; 0 for no limit.
    chunk_bytes: usize,
    /// Nothing is forwarded.
    held: bool,
    /// Connections with lower numbers are cut.
    cut_below: u64,
    /// Connections with lower numbers are black-holed for ever: they stay open, but nothing is
    /// forwarded.
    black_holed_below: u64,
}

/// A handle of one proxy. Dropping the last clone closes all connections.
#[derive(Clone, Debug)]
pub struct Proxy {
    link: Arc<Link>,
    port: u16,
    _accepting: Arc<Accepting>,
}

/// Aborts the task when dropped.
#[derive(Debug)]
struct Accepting(AbortHandle);

impl Drop for Accepting {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[derive(Debug)]
struct Link {
    protocol: Protocol,
    server: SocketAddr,
    faults: watch::Sender<Faults>,
    cuts: Cuts,
    meter: Meter,
    connections: AtomicU64,
    seed: Mutex<Seed>,
}

impl Proxy {
    /// Listens on a free port and forwards to `server_port` on this machine.
    pub async fn open(protocol: Protocol, server_port: u16, seed: Seed) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(local(0)).await?;
        let port = listener.local_addr()?.port();
        let link = Arc::new(Link {
            protocol,
            server: local(server_port),
            faults: watch::Sender::new(Faults::default()),
            cuts: Cuts::default(),
            meter: Meter::default(),
            connections: AtomicU64::new(0),
            seed: Mutex::new(seed),
        });
        let accepting = tokio::spawn({
            let link = Arc::downgrade(&link);
            async move {
                // Dropped with the last handle, which closes all connections.
                let mut open = JoinSet::new();
                loop {
                    while open.try_join_next().is_some() {}
                    let Ok((client, _)) = listener.accept().await else {
                        continue;
                    };
                    let Some(link) = link.upgrade() else { return };
                    open.spawn(link.forward(client));
                }
            }
        });
        Ok(Self {
            link,
            port,
            _accepting: Arc::new(Accepting(accepting.abort_handle())),
        })
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Arms a cut: the next `times` messages of this kind are lost.
    pub fn arm(&self, cut: Cut, times: usize) {
        self.link.cuts.arm(cut, times);
    }

    /// How often this cut fired.
    pub fn fired(&self, cut: Cut) -> u64 {
        self.link.cuts.fired(cut)
    }

    /// How many armed cuts have not fired yet.
    pub fn armed(&self) -> usize {
        self.link.cuts.armed()
    }

    pub fn disarm(&self) {
        self.link.cuts.with(|(armed, _)| armed.clear());
    }

    /// How many connections were opened since the proxy was opened.
    pub fn connections(&self) -> u64 {
        self.link.connections.load(Ordering::Relaxed)
    }

    pub fn traffic(&self) -> Traffic {
        *self
            .link
            .meter
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Cuts every connection (RST). New connections work.
    pub fn cut(&self) {
        self.link
            .faults
            .send_modify(|faults| faults.cut_below = self.connections());
    }

    /// Black-holes every open connection for ever, and new ones until [`Self::clear_faults`]:
    /// connections stay open, but nothing is forwarded.
    pub fn black_hole(&self) {
        self.link.faults.send_modify(|faults| {
            (faults.black_holed_below, faults.held) = (self.connections(), true)
        });
    }

    /// Forwards nothing until [`Self::clear_faults`]; then forwards the bytes that were held back.
    pub fn hold(&self) {
        self.link.faults.send_modify(|faults| faults.held = true);
    }

    /// Splits data into chunks of at most `chunk_bytes` (0: no limit), and delays each by up to
    /// `delay`.
    pub fn slow(&self, delay: Duration, chunk_bytes: usize) {
        self.link
            .faults
            .send_modify(|faults| (faults.delay, faults.chunk_bytes) = (delay, chunk_bytes));
    }

    /// Ends all faults. Black-holed connections stay black-holed.
    pub fn clear_faults(&self) {
        self.link.faults.send_modify(|faults| {
            (faults.held, faults.delay, faults.chunk_bytes) = (false, Duration::ZERO, 0)
        });
    }
}

struct Reset;

impl From<std::io::Error> for Reset {
    fn from(_: std::io::Error) -> Self {
        Self
    }
}

enum Session {
    Postgres(Box<Mutex<postgres::Session>>),
    Nats,
    Plain,
}

impl Link {
    async fn forward(self: Arc<Self>, mut client: TcpStream) {
        let number = self.connections.fetch_add(1, Ordering::Relaxed);
        let cut = async {
            let mut faults = self.faults.subscribe();
            // The sender lives as long as `self`.
            let _ = faults.wait_for(|faults| number < faults.cut_below).await;
        };
        let mut server = None;
        let carried = async {
            self.until_open(number).await;
            let connected = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(self.server))
                .await
                .map_err(|_| Reset)??;
            let server = server.insert(connected);
            client.set_nodelay(true)?;
            server.set_nodelay(true)?;
            let session = match self.protocol {
                Protocol::Postgres => Session::Postgres(Box::default()),
                Protocol::Nats => Session::Nats,
                Protocol::Plain => Session::Plain,
            };
            let (client_reads, client_writes) = client.split();
            let (server_reads, server_writes) = server.split();
            tokio::try_join!(
                self.pump(
                    number,
                    Direction::ToServer,
                    &session,
                    client_reads,
                    server_writes
                ),
                self.pump(
                    number,
                    Direction::ToClient,
                    &session,
                    server_reads,
                    client_writes
                ),
            )
            .map(|_| ())
        };
        let ended = tokio::select! {
            ended = carried => ended,
            () = cut => Err(Reset),
        };
        if ended.is_err() {
            for stream in [Some(&client), server.as_ref()].into_iter().flatten() {
                // Sends RST. Without this the peer would see a graceful close.
                let _ = stream.set_zero_linger();
            }
        }
    }

    async fn pump(
        &self,
        number: u64,
        direction: Direction,
        session: &Session,
        mut from: ReadHalf<'_>,
        mut to: WriteHalf<'_>,
    ) -> Result<(), Reset> {
        let mut bytes = BytesMut::with_capacity(16 * 1024);
        loop {
            if from.read_buf(&mut bytes).await? == 0 {
                if self.is_black_holed(number) {
                    return Err(Reset);
                }
                return Ok(to.shutdown().await?);
            }
            if self.faults.borrow().held || self.is_black_holed(number) {
                if direction == Direction::ToServer {
                    // If the client closes its side, the server must see it. Otherwise the server
                    // would keep the connection for ever.
                    let mut closed = BytesMut::new();
                    tokio::select! {
                        () = self.until_open(number) => {}
                        read = until_closed(&mut from, &mut closed) => match read {
                            Ok(never) => match never {},
                            Err(reset) => return Err(reset),
                        },
                    }
                    bytes.unsplit(closed);
                } else {
                    self.until_open(number).await;
                }
            }
            let passed = match session {
                Session::Postgres(session) => session
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .pass(direction, &mut bytes, &self.cuts, &self.meter),
                Session::Nats => nats::pass(direction, &mut bytes, &self.cuts, &self.meter),
                Session::Plain => Action::Forward(bytes.split().freeze()),
            };
            match passed {
                Action::Forward(bytes) => self.write(bytes, &mut to).await?,
                Action::ForwardThenCut(bytes) => {
                    self.write(bytes, &mut to).await?;
                    return Err(Reset);
                }
            }
        }
    }

    async fn write(&self, mut bytes: Bytes, to: &mut WriteHalf<'_>) -> Result<(), Reset> {
        while !bytes.is_empty() {
            let Faults {
                delay, chunk_bytes, ..
            } = *self.faults.borrow();
            if !delay.is_zero() {
                let share = self
                    .seed
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .fraction();
                tokio::time::sleep(delay.mul_f64(share)).await;
            }
            let chunk_bytes = if chunk_bytes == 0 {
                bytes.len()
            } else {
                chunk_bytes.min(bytes.len())
            };
            to.write_all(&bytes.split_to(chunk_bytes)).await?;
        }
        Ok(())
    }

    fn is_black_holed(&self, number: u64) -> bool {
        number < self.faults.borrow().black_holed_below
    }

    /// Waits until this connection forwards again. Never returns for a black-holed connection.
    async fn until_open(&self, number: u64) {
        let mut faults = self.faults.subscribe();
        // The sender lives as long as `self`.
        let _ = faults
            .wait_for(|faults| !faults.held && number >= faults.black_holed_below)
            .await;
    }
}

/// Reads until the other side closes the connection.
async fn until_closed(from: &mut ReadHalf<'_>, bytes: &mut BytesMut) -> Result<Infallible, Reset> {
    loop {
        if from.read_buf(bytes).await? == 0 {
            return Err(Reset);
        }
    }
}
