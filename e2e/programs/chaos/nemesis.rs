//! The faults and their schedule: at a fixed rate, each kind at least once, in an order that the
//! seed determines.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context as _;
use e2e::broker::{operator, replay_stream};
use sea_orm::{ConnectionTrait as _, TransactionTrait as _};
use stack::proxy::Cut;
use stack::seed::Seed;
use stack::testing::TestStack;
use stack::{NAMES, Proxies, System};
use tokio::time::Instant;

const START_WITHIN: Duration = Duration::from_secs(60);
const CUTS_WITHIN: Duration = Duration::from_secs(45);
/// A relay waits 4 seconds for each lost PubAck. Many in a row would hide all other faults from it.
const LOST_PUBACKS: usize = 3;
const RETRY_INTERVAL: Duration = Duration::from_millis(100);
/// Delay before the first fault, until there is load.
const CALM: Duration = Duration::from_secs(2);
/// Messages in a replay: enough to matter, and few enough to leave time for other faults.
const REPLAYED_MAX: u64 = 500;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Kill(&'static str),
    PostgresImmediate,
    Pause(&'static str),
    /// Kills everything at once and restarts it in any order.
    PowerCut,
    Wipe,
    /// Copies the broker's data for [`Action::RollBack`].
    Copy,
    RollBack,
    DeleteStream,
    RecreateConsumer,
    Replay,
    CutAll,
    /// Blocks the connections one after the other, and reopens them in another order.
    Swizzle,
    Slow,
    BlackHole(&'static str),
    /// Another session holds what this statement locks or sees, in the database of the service.
    Session(&'static str, &'static str),
    /// The database of this service accepts no writes, as after a demotion.
    ReadOnly(&'static str),
    /// Armed at the proxies of this service; fires when the message passes.
    Lose(&'static str, &'static str, Cut, usize),
}

struct Fault {
    name: &'static str,
    /// Each kind happens at least once.
    per_minute: f64,
    act: Action,
}

const fn fault(name: &'static str, per_minute: f64, act: Action) -> Fault {
    Fault {
        name,
        per_minute,
        act,
    }
}

const fn unknown(name: &'static str, service: &'static str, after: &'static str) -> Fault {
    fault(
        name,
        1.0,
        Action::Lose(service, "postgres", Cut::CommitAnswer { after }, 1),
    )
}

const FAULTS: [Fault; 38] = [
    fault("kill -9 orders", 3.0, Action::Kill("orders")),
    fault("kill -9 payments", 3.0, Action::Kill("payments")),
    fault("kill -9 gateway", 2.0, Action::Kill("gateway")),
    fault("kill -9 nats", 2.0, Action::Kill("nats")),
    fault(
        "crash of postgres (kill -9)",
        0.34,
        Action::Kill("postgres"),
    ),
    fault(
        "immediate stop of postgres",
        0.34,
        Action::PostgresImmediate,
    ),
    fault("SIGSTOP of orders", 0.5, Action::Pause("orders")),
    fault("SIGSTOP of payments", 0.5, Action::Pause("payments")),
    fault("SIGSTOP of gateway", 0.34, Action::Pause("gateway")),
    fault("SIGSTOP of nats", 0.5, Action::Pause("nats")),
    fault("everything killed at once", 0.34, Action::PowerCut),
    fault("broker wiped", 0.34, Action::Wipe),
    fault("broker rolled back", 0.17, Action::RollBack),
    fault("stream deleted", 0.34, Action::DeleteStream),
    fault("consumer re-created", 0.34, Action::RecreateConsumer),
    fault("stream replayed", 0.5, Action::Replay),
    fault("all connections cut", 1.0, Action::CutAll),
    fault("connections blocked one by one", 0.5, Action::Swizzle),
    fault("slow network", 0.34, Action::Slow),
    fault(
        "black hole to postgres",
        0.34,
        Action::BlackHole("postgres"),
    ),
    fault("black hole to nats", 0.34, Action::BlackHole("nats")),
    fault(
        "account locked",
        1.0,
        Action::Session(
            "payments",
            "SELECT 1 FROM accounts ORDER BY random() LIMIT 1 FOR UPDATE",
        ),
    ),
    fault(
        "all NEW orders locked",
        0.5,
        Action::Session(
            "orders",
            "SELECT 1 FROM orders WHERE status = 'NEW' FOR UPDATE",
        ),
    ),
    fault(
        "old snapshot",
        0.5,
        Action::Session(
            "orders",
            "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM outbox",
        ),
    ),
    fault("orders read-only", 0.34, Action::ReadOnly("orders")),
    fault("payments read-only", 0.34, Action::ReadOnly("payments")),
    unknown("unknown commit at intake", "orders", "INSERT INTO orders"),
    unknown(
        "unknown commit at deposit",
        "payments",
        "SET balance = balance + $2",
    ),
    unknown(
        "unknown commit at charge",
        "payments",
        "INSERT INTO payments",
    ),
    unknown(
        "unknown commit at settle",
        "orders",
        "UPDATE orders o SET status",
    ),
    unknown(
        "unknown commit at the relay of orders",
        "orders",
        "UPDATE outbox o SET published_at",
    ),
    unknown(
        "unknown commit at the relay of payments",
        "payments",
        "UPDATE outbox o SET published_at",
    ),
    fault(
        "COMMIT lost before the server",
        1.0,
        Action::Lose(
            "orders",
            "postgres",
            Cut::CommitRequest {
                after: "INSERT INTO orders",
            },
            1,
        ),
    ),
    fault(
        "PubAck lost, orders",
        3.0,
        Action::Lose("orders", "nats", Cut::PubAck, LOST_PUBACKS),
    ),
    fault(
        "PubAck lost, payments",
        2.0,
        Action::Lose("payments", "nats", Cut::PubAck, LOST_PUBACKS),
    ),
    fault(
        "ack lost, payments",
        1.0,
        Action::Lose("payments", "nats", Cut::Ack, 10),
    ),
    fault(
        "ack lost, orders",
        1.0,
        Action::Lose("orders", "nats", Cut::Ack, 10),
    ),
    fault(
        "delivery lost, payments",
        1.0,
        Action::Lose("payments", "nats", Cut::Delivery, 10),
    ),
];

pub(crate) struct Nemesis {
    stack: TestStack,
    proxies: Proxies,
    seed: Seed,
    /// The time since the start, and the index of the fault.
    schedule: Vec<(Duration, usize)>,
    fired: BTreeMap<&'static str, u64>,
    copied: bool,
    unexpected_exits: Vec<String>,
}

impl Nemesis {
    pub(crate) fn new(
        stack: TestStack,
        proxies: Proxies,
        over: Duration,
        only: &[String],
        seed: &mut Seed,
    ) -> anyhow::Result<Self> {
        let mut seed = seed.fork();
        let wanted = |fault: &Fault| {
            only.is_empty() || only.iter().any(|word| fault.name.contains(word.as_str()))
        };
        let mut deck: Vec<usize> = Vec::new();
        for (index, fault) in FAULTS.iter().enumerate().filter(|(_, fault)| wanted(fault)) {
            let times = (fault.per_minute * over.as_secs_f64() / 60.0)
                .round()
                .max(1.0);
            deck.extend(std::iter::repeat_n(index, times as usize));
        }
        anyhow::ensure!(
            !deck.is_empty(),
            "no fault has a name that contains {only:?}; the faults are: {}",
            FAULTS.each_ref().map(|fault| fault.name).join(", ")
        );
        seed.shuffle(&mut deck);
        // A rollback needs an earlier copy.
        deck.sort_by_key(|index| u8::from(FAULTS[*index].act == Action::RollBack));
        if let Some(first) = deck
            .iter()
            .position(|index| FAULTS[*index].act == Action::RollBack)
        {
            let rolls = deck.split_off(first);
            for roll in rolls {
                let half = deck.len() / 2;
                let place = half + usize::try_from(seed.below((deck.len() - half) as u64 + 1))?;
                deck.insert(place, roll);
            }
        }
        let step = over.saturating_sub(CALM) / u32::try_from(deck.len())?;
        let times = (0_u32..).map(|number| CALM + step * number);
        let fired = FAULTS
            .iter()
            .filter(|fault| wanted(fault))
            .map(|fault| (fault.name, 0))
            .collect();
        Ok(Self {
            stack,
            proxies,
            seed,
            schedule: times.zip(deck).collect(),
            fired,
            copied: false,
            unexpected_exits: Vec::new(),
        })
    }

    pub(crate) fn system(&self) -> &System {
        &self.stack.system
    }

    pub(crate) fn planned(&self) -> usize {
        self.schedule.len()
    }

    pub(crate) fn unexpected_exits(&self) -> &[String] {
        &self.unexpected_exits
    }

    /// How often each kind of fault happened.
    pub(crate) fn fired(&self) -> BTreeMap<&'static str, u64> {
        self.fired.clone()
    }

    /// Runs the schedule. `status`: the number of faults done, a space, the current fault.
    pub(crate) async fn run(
        &mut self,
        begun: Instant,
        status: &RefCell<String>,
    ) -> anyhow::Result<()> {
        let schedule = std::mem::take(&mut self.schedule);
        let has_roll_back = schedule
            .iter()
            .any(|(_, index)| FAULTS[*index].act == Action::RollBack);
        for (number, (at, index)) in schedule.iter().enumerate() {
            tokio::time::sleep_until(begun + *at).await;
            let fault = &FAULTS[*index];
            *status.borrow_mut() = format!("{number} {}", fault.name);
            self.count_cuts();
            self.check_processes().await?;
            if has_roll_back && !self.copied && number >= schedule.len() / 5 {
                self.run_action(Action::Copy)
                    .await
                    .context("copying the broker's data")?;
            }
            self.run_action(fault.act)
                .await
                .with_context(|| fault.name)?;
            if !matches!(fault.act, Action::Lose(..)) {
                *self.fired.entry(fault.name).or_default() += 1;
            }
        }
        *status.borrow_mut() = format!("{} waiting for the last cuts", schedule.len());
        // An armed cut fires when its message passes, and some messages exist only under load.
        let deadline = Instant::now() + CUTS_WITHIN;
        while self.proxies.all().any(|proxy| proxy.armed() > 0) && Instant::now() < deadline {
            tokio::time::sleep(RETRY_INTERVAL).await;
            self.check_processes().await?;
        }
        for proxy in self.proxies.all() {
            proxy.disarm();
            proxy.clear_faults();
        }
        self.count_cuts();
        self.check_processes().await
    }

    async fn run_action(&mut self, act: Action) -> anyhow::Result<()> {
        let system = &mut self.stack.system;
        match act {
            Action::Kill(name) => {
                system.kill(name).await?;
                self.pause_up_to(400).await;
                self.start(name).await
            }
            Action::PostgresImmediate => {
                system.stop_postgres_immediately().await?;
                self.start("postgres").await
            }
            Action::Pause(name) => {
                system.pause(name)?;
                // Longer than the broker's ack wait.
                tokio::time::sleep(Duration::from_millis(1500 + self.seed.below(1500))).await;
                self.stack.system.resume(name)
            }
            Action::PowerCut => {
                let mut names = NAMES;
                self.seed.shuffle(&mut names);
                for name in names {
                    self.stack.system.kill(name).await?;
                }
                self.seed.shuffle(&mut names);
                for name in names {
                    // Without waiting: each part must tolerate that the others are not running.
                    self.until_spawned(name).await?;
                }
                for name in names {
                    self.start(name).await?;
                }
                Ok(())
            }
            Action::Wipe => {
                system.kill("nats").await?;
                system.wipe_nats()?;
                self.start("nats").await
            }
            Action::Copy => {
                system.kill("nats").await?;
                system.copy_nats()?;
                self.copied = true;
                self.start("nats").await
            }
            Action::RollBack => {
                system.kill("nats").await?;
                system.roll_back_nats()?;
                self.start("nats").await
            }
            Action::DeleteStream => {
                let stream = self.pick(["ORDERS", "PAYMENTS"]);
                self.with_broker(async |ops| {
                    ops.jetstream().delete_stream(stream).await?;
                    Ok(())
                })
                .await
            }
            Action::RecreateConsumer => {
                let (stream, consumer) = self.pick([
                    ("ORDERS", "payments-order-placed"),
                    ("PAYMENTS", "orders-payment-settled"),
                ]);
                self.with_broker(async |ops| {
                    ops.jetstream()
                        .delete_consumer_from_stream(consumer, stream)
                        .await?;
                    Ok(())
                })
                .await
            }
            Action::Replay => {
                let stream = self.pick(["ORDERS", "PAYMENTS"]);
                self.with_broker(async |ops| {
                    replay_stream(ops, stream, REPLAYED_MAX).await?;
                    Ok(())
                })
                .await
            }
            Action::CutAll => {
                self.proxies.all().for_each(stack::proxy::Proxy::cut);
                Ok(())
            }
            Action::Swizzle => {
                let mut proxies: Vec<_> = self.proxies.all().cloned().collect();
                self.seed.shuffle(&mut proxies);
                for proxy in &proxies {
                    proxy.hold();
                    self.pause_up_to(300).await;
                }
                self.seed.shuffle(&mut proxies);
                for proxy in &proxies {
                    proxy.clear_faults();
                    self.pause_up_to(300).await;
                }
                Ok(())
            }
            Action::Slow => {
                let piece = self.pick([0, 64, 512]);
                let delay = if piece == 0 {
                    Duration::from_millis(200)
                } else {
                    Duration::from_millis(2)
                };
                self.proxies
                    .all()
                    .for_each(|proxy| proxy.slow(delay, piece));
                tokio::time::sleep(Duration::from_secs(3)).await;
                self.proxies
                    .all()
                    .for_each(stack::proxy::Proxy::clear_faults);
                Ok(())
            }
            Action::BlackHole(part) => {
                let service = self.pick(["orders", "payments"]);
                let proxy = self.proxies.between(service, part).clone();
                proxy.black_hole();
                tokio::time::sleep(Duration::from_millis(1000 + self.seed.below(3000))).await;
                proxy.clear_faults();
                Ok(())
            }
            Action::Session(service, statement) => {
                let db = system.postgres().connect(service).await?;
                let session = db.begin().await?;
                session.execute_unprepared(statement).await?;
                tokio::time::sleep(Duration::from_millis(1500 + self.seed.below(2000))).await;
                session.rollback().await?;
                Ok(db.close().await?)
            }
            Action::ReadOnly(service) => {
                // Another database of the server: this one accepts no writes from here either.
                let other = if service == "orders" {
                    "payments"
                } else {
                    "orders"
                };
                let db = system.postgres().connect(other).await?;
                for value in ["on", "off"] {
                    db.execute_unprepared(&format!(
                        "ALTER DATABASE {service} SET default_transaction_read_only = {value}"
                    ))
                    .await?;
                    // Sessions that exist keep the old value. The service must drop those that
                    // accept no writes by itself.
                    if value == "on" {
                        db.execute_unprepared(&format!(
                            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                             WHERE datname = '{service}'"
                        ))
                        .await?;
                        let lasts = Duration::from_millis(500 + self.seed.below(1500));
                        tokio::time::sleep(lasts).await;
                    }
                }
                Ok(db.close().await?)
            }
            Action::Lose(service, part, cut, times) => {
                self.proxies.between(service, part).arm(cut, times);
                Ok(())
            }
        }
    }

    /// Adds the cuts that the proxies counted.
    fn count_cuts(&mut self) {
        for fault in &FAULTS {
            if let Action::Lose(service, part, cut, _) = fault.act
                && let Some(count) = self.fired.get_mut(fault.name)
            {
                *count = self.proxies.between(service, part).fired(cut);
            }
        }
    }

    /// Records every process that has exited although no fault killed it.
    async fn check_processes(&mut self) -> anyhow::Result<()> {
        for name in NAMES {
            if let Some(status) = self.stack.system.ended(name) {
                let log = stack::process::tail(&self.stack.system.folder().log(name), 5);
                self.unexpected_exits
                    .push(format!("{name} exited unexpectedly ({status}): {log}"));
                self.start(name).await?;
            }
        }
        Ok(())
    }

    async fn with_broker(
        &self,
        work: impl AsyncFn(&broker::Broker) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let deadline = Instant::now() + START_WITHIN;
        let ops = tokio::time::timeout(START_WITHIN, operator(&self.stack.system))
            .await
            .context("the broker cannot be reached")??;
        // A service may be re-creating what this fault has just deleted.
        loop {
            match work(&ops).await {
                Ok(()) => return Ok(()),
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(_) => tokio::time::sleep(RETRY_INTERVAL).await,
            }
        }
    }

    /// Starts a part and waits until it is ready. PostgreSQL may need several attempts while
    /// child processes of the killed server are still exiting.
    async fn start(&mut self, name: &'static str) -> anyhow::Result<()> {
        let deadline = Instant::now() + START_WITHIN;
        loop {
            self.until_spawned(name).await?;
            match self.stack.system.until_ready(name).await {
                Ok(()) => return Ok(()),
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(_) => tokio::time::sleep(RETRY_INTERVAL).await,
            }
        }
    }

    async fn until_spawned(&mut self, name: &'static str) -> anyhow::Result<()> {
        if self.stack.system.pid(name).is_none() {
            self.stack.system.spawn(name)?;
        }
        Ok(())
    }

    async fn pause_up_to(&mut self, milliseconds: u64) {
        tokio::time::sleep(Duration::from_millis(self.seed.below(milliseconds))).await;
    }

    fn pick<T: Copy, const N: usize>(&mut self, things: [T; N]) -> T {
        things[usize::try_from(self.seed.below(N as u64)).unwrap_or(0)]
    }
}
