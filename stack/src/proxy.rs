//! A network that does not behave, between a service and what it talks to: slow, cut, leading into nothing, and losing
//! exactly the answer that matters. For connections in plain text on this machine.

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

/// What goes over a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// Understood well enough for cuts at COMMIT.
    Postgres,
    /// Understood well enough for lost acks.
    Nats,
    /// Bytes.
    Plain,
}

/// One message that is lost, the next time it comes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cut {
    /// The server has committed a transaction that contained these words; its answer is lost with the connection.
    CommitAnswer {
        /// Part of a statement, as the service sends it; empty for any transaction.
        after: &'static str,
    },
    /// COMMIT is lost with the connection on the way to the server, who rolls back. To the client it looks the same.
    CommitRequest {
        /// As above.
        after: &'static str,
    },
    /// The broker has stored a message; its answer is lost.
    PubAck,
    /// A reader's ack is lost.
    Ack,
    /// A message on its way to a reader is lost.
    Delivery,
}

/// Which cuts wait for their message, and which were made.
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

/// What clients have sent through a proxy since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Statements that PostgreSQL was to run.
    pub statements: u64,
    /// How often somebody waited for PostgreSQL's answer.
    pub round_trips: u64,
    /// Messages for the broker, acks and requests included.
    pub messages: u64,
    /// Their bytes, headers included.
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

/// What becomes of bytes.
enum Passed {
    /// These go on.
    On(Bytes),
    /// These go on, and then the connection is gone.
    Cut(Bytes),
}

/// How the network is.
#[derive(Clone, Copy, Debug, Default)]
struct Weather {
    /// Each piece is late by up to this much.
    delay: Duration,
    /// Bytes in a piece; 0 for as many as there are.
    piece: usize,
    /// Nothing goes through, until it does again.
    held: bool,
    /// Connections below this number are cut.
    cut_below: u64,
    /// Through connections below this number nothing goes any more, for ever, and nobody is told.
    dead_below: u64,
}

/// The control of one proxy. Its connections end with the last of its clones.
#[derive(Clone, Debug)]
pub struct Proxy {
    link: Arc<Link>,
    port: u16,
    _accepting: Arc<Accepting>,
}

/// Ends with the proxy.
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
                // Connections end with this set, and this set with the last handle.
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

    /// Where it listens on this machine.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Loses the next so many of these messages.
    pub fn arm(&self, cut: Cut, times: usize) {
        self.link.armory.arm(cut, times);
    }

    /// How often this cut was made.
    pub fn fired(&self, cut: Cut) -> u64 {
        self.link.armory.fired(cut)
    }

    /// How many cuts wait for their message.
    pub fn waiting(&self) -> usize {
        self.link.armory.waiting()
    }

    /// Forgets the cuts that still wait.
    pub fn disarm(&self) {
        self.link.armory.with(|(waiting, _)| waiting.clear());
    }

    /// How many connections were made.
    pub fn connections(&self) -> u64 {
        self.link.connections.load(Ordering::Relaxed)
    }

    /// What clients have sent so far.
    pub fn traffic(&self) -> Traffic {
        *self
            .link
            .meter
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Cuts every connection (RST). New ones work.
    pub fn cut(&self) {
        self.link
            .weather
            .send_modify(|weather| weather.cut_below = self.connections());
    }

    /// Every connection leads into nothing, and so do new ones until [`Self::heal`]: nobody is told, nothing is closed.
    pub fn black_hole(&self) {
        self.link
            .weather
            .send_modify(|weather| (weather.dead_below, weather.held) = (self.connections(), true));
    }

    /// Nothing goes through until [`Self::heal`]; then everything goes on.
    pub fn hold(&self) {
        self.link.weather.send_modify(|weather| weather.held = true);
    }

    /// Each piece of at most so many bytes (0: any number) is late by up to so much.
    pub fn slow(&self, delay: Duration, piece: usize) {
        self.link
            .weather
            .send_modify(|weather| (weather.delay, weather.piece) = (delay, piece));
    }

    /// The network behaves again. What led into nothing stays so.
    pub fn heal(&self) {
        self.link.weather.send_modify(|weather| {
            (weather.held, weather.delay, weather.piece) = (false, Duration::ZERO, 0)
        });
    }
}

/// The connection is to be cut.
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
            // The sender lives as long as we do.
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
                // Without it the end would look like a polite one.
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
                    // Whoever gives up on it closes it; that much must be seen, or servers would keep it for ever.
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

    /// Waits until something goes through this connection: for ever, if it is dead.
    async fn until_open(&self, number: u64) {
        let mut weather = self.weather.subscribe();
        // The sender lives as long as we do.
        let _ = weather
            .wait_for(|weather| !weather.held && number >= weather.dead_below)
            .await;
    }
}

/// Reads on while nothing goes through, until the other side has closed.
async fn until_closed(from: &mut ReadHalf<'_>, bytes: &mut BytesMut) -> Result<Infallible, Reset> {
    loop {
        if from.read_buf(bytes).await? == 0 {
            return Err(Reset);
        }
    }
}
