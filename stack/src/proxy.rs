//! A faulty network between a client and a server: slow, cut, black-holed, or losing exactly one message. For
//! unencrypted connections on this machine.

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

/// A message to lose the next time it passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cut {
    /// The server committed a transaction that contained these words; its answer and the connection are lost.
    CommitAnswer {
        /// Part of a statement; empty for any transaction.
        after: &'static str,
    },
    /// COMMIT and the connection are lost before the server, which rolls back. The client cannot tell the difference.
    CommitRequest {
        /// As above.
        after: &'static str,
    },
    /// The broker stored a message; its answer is lost.
    PubAck,
    /// A reader's ack is lost.
    Ack,
    /// A message on its way to a reader is lost.
    Delivery,
}

/// The armed cuts, and how often each one fired.
#[derive(Debug, Default)]
struct Armory(Mutex<(Vec<Cut>, BTreeMap<Cut, u64>)>);

impl Armory {
    fn arm(&self, cut: Cut, times: usize) {
        self.with(|(waiting, _)| waiting.extend(std::iter::repeat_n(cut, times)));
    }

    fn take(&self, is_meant: impl Fn(&Cut) -> bool) -> bool {
        self.with(|(waiting, fired)| match waiting.iter().position(is_meant) {
            Some(index) => {
                *fired.entry(waiting.swap_remove(index)).or_default() += 1;
                true
            }
            None => false,
        })
    }

    fn fired(&self, cut: Cut) -> u64 {
        self.with(|(_, fired)| fired.get(&cut).copied().unwrap_or_default())
    }

    fn waiting(&self) -> usize {
        self.with(|(waiting, _)| waiting.len())
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
    /// How often a client waited for PostgreSQL's answer.
    pub round_trips: u64,
    /// Messages for the broker, including acks and requests.
    pub messages: u64,
    /// Their bytes, including headers.
    pub message_bytes: u64,
}

/// Counts [`Traffic`].
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

/// What to do with bytes.
enum Passed {
    /// Forward them.
    On(Bytes),
    /// Forward them, then cut the connection.
    Cut(Bytes),
}

/// The state of the network.
#[derive(Clone, Copy, Debug, Default)]
struct Weather {
    /// Each chunk is delayed by up to this much.
    delay: Duration,
    /// Bytes in a chunk; 0 for no limit.
    piece: usize,
    /// Nothing is forwarded for now.
    held: bool,
    /// Connections with lower numbers are cut.
    cut_below: u64,
    /// Connections with lower numbers are black-holed for ever: nothing is forwarded, nothing is closed.
    dead_below: u64,
}

/// A handle of one proxy. Its connections are closed when the last clone is dropped.
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
    weather: watch::Sender<Weather>,
    armory: Armory,
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
            weather: watch::Sender::new(Weather::default()),
            armory: Armory::default(),
            meter: Meter::default(),
            connections: AtomicU64::new(0),
            seed: Mutex::new(seed),
        });
        let accepting = tokio::spawn({
            let link = Arc::downgrade(&link);
            async move {
                // Connections are closed when this set is dropped, which is when the last handle is.
                let mut open = JoinSet::new();
                loop {
                    while open.try_join_next().is_some() {}
                    let Ok((client, _)) = listener.accept().await else {
                        continue;
                    };
                    let Some(link) = link.upgrade() else { return };
                    open.spawn(link.carry(client));
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

    /// Loses the next `times` messages of this kind.
    pub fn arm(&self, cut: Cut, times: usize) {
        self.link.armory.arm(cut, times);
    }

    /// How often this cut fired.
    pub fn fired(&self, cut: Cut) -> u64 {
        self.link.armory.fired(cut)
    }

    /// How many cuts are armed.
    pub fn waiting(&self) -> usize {
        self.link.armory.waiting()
    }

    /// Disarms all cuts.
    pub fn disarm(&self) {
        self.link.armory.with(|(waiting, _)| waiting.clear());
    }

    /// How many connections were opened.
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
            .weather
            .send_modify(|weather| weather.cut_below = self.connections());
    }

    /// Black-holes every connection, and new ones until [`Self::heal`]: nothing is forwarded, nothing is closed.
    pub fn black_hole(&self) {
        self.link
            .weather
            .send_modify(|weather| (weather.dead_below, weather.held) = (self.connections(), true));
    }

    /// Holds all bytes back until [`Self::heal`].
    pub fn hold(&self) {
        self.link.weather.send_modify(|weather| weather.held = true);
    }

    /// Delays each chunk of at most `piece` bytes (0: no limit) by up to `delay`.
    pub fn slow(&self, delay: Duration, piece: usize) {
        self.link
            .weather
            .send_modify(|weather| (weather.delay, weather.piece) = (delay, piece));
    }

    /// Ends all faults. Black-holed connections stay dead.
    pub fn heal(&self) {
        self.link.weather.send_modify(|weather| {
            (weather.held, weather.delay, weather.piece) = (false, Duration::ZERO, 0)
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
    async fn carry(self: Arc<Self>, mut client: TcpStream) {
        let number = self.connections.fetch_add(1, Ordering::Relaxed);
        let cut = async {
            let mut weather = self.weather.subscribe();
            // The sender lives as long as `self`.
            let _ = weather.wait_for(|weather| number < weather.cut_below).await;
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
                // Without this the peer would see a graceful end.
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
                if self.is_dead(number) {
                    return Err(Reset);
                }
                return Ok(to.shutdown().await?);
            }
            if self.weather.borrow().held || self.is_dead(number) {
                if direction == Direction::ToServer {
                    // If one side gives up and closes, the other one must see it, or servers would keep it for ever.
                    let mut closed = BytesMut::new();
                    tokio::select! {
                        () = self.until_open(number) => {}
                        read = until_closed(&mut from, &mut closed) => match read { Ok(never) => match never {}, Err(reset) => return Err(reset) },
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
                    .pass(direction, &mut bytes, &self.armory, &self.meter),
                Session::Nats => nats::pass(direction, &mut bytes, &self.armory, &self.meter),
                Session::Plain => Passed::On(bytes.split().freeze()),
            };
            match passed {
                Passed::On(bytes) => self.write(bytes, &mut to).await?,
                Passed::Cut(bytes) => {
                    self.write(bytes, &mut to).await?;
                    return Err(Reset);
                }
            }
        }
    }

    async fn write(&self, mut bytes: Bytes, to: &mut WriteHalf<'_>) -> Result<(), Reset> {
        while !bytes.is_empty() {
            let Weather { delay, piece, .. } = *self.weather.borrow();
            if !delay.is_zero() {
                let share = self
                    .seed
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .share();
                tokio::time::sleep(delay.mul_f64(share)).await;
            }
            let piece = if piece == 0 {
                bytes.len()
            } else {
                piece.min(bytes.len())
            };
            to.write_all(&bytes.split_to(piece)).await?;
        }
        Ok(())
    }

    fn is_dead(&self, number: u64) -> bool {
        number < self.weather.borrow().dead_below
    }

    /// Waits until this connection forwards again; for ever if it is black-holed.
    async fn until_open(&self, number: u64) {
        let mut weather = self.weather.subscribe();
        // The sender lives as long as `self`.
        let _ = weather
            .wait_for(|weather| !weather.held && number >= weather.dead_below)
            .await;
    }
}

/// Reads and discards until the other side closes.
async fn until_closed(from: &mut ReadHalf<'_>, bytes: &mut BytesMut) -> Result<Infallible, Reset> {
    loop {
        if from.read_buf(bytes).await? == 0 {
            return Err(Reset);
        }
    }
}
