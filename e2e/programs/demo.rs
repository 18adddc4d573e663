//! `./dev demo`: twenty orders while payments is killed, messages are duplicated and the broker's
//! disk is wiped. Prints each event as it happens, and at the end the result of an audit of both
//! databases.

use std::fmt;
use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use async_nats::jetstream;
use broker::Broker;
use e2e::broker::operator;
use e2e::{checks, until_done};
use ops::audit::{self, Databases, FindingKind};
use sea_orm::{ConnectionTrait as _, DatabaseConnection, DbBackend, Statement};
use serde_json::{Value, json};
use stack::http::Http;
use stack::testing::TestStack;
use tokio::time::Instant;
use uuid::Uuid;

const ORDERS: usize = 20;
const PRICE: i64 = 100;
/// Alice's money is enough for this many of them.
const AFFORDABLE: i64 = 15;
/// After this many orders, messages of the first ones are delivered a second time.
const REPEAT_AFTER: usize = 8;
const REPEATED: u64 = 2;
const KILL_AT: usize = 10;
/// Timeout, much longer than needed.
const WITHIN: Duration = Duration::from_secs(60);
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
/// Short timers: by default the broker redelivers the messages of a dead process after 30 s.
const TIMERS: [(&str, &str); 2] = [
    ("GOZON_ACK_WAIT_MS", "1000"),
    ("GOZON_ASK_AGAIN_MS", "2000"),
];

// One thread: the kernel ends the processes of a stack when the thread that started them ends.
#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<ExitCode> {
    let printer = Printer {
        begun: Instant::now(),
        colours: std::io::stdout().is_terminal(),
    };
    printer.title("Twenty orders, and everything that can go wrong.");
    printer
        .say("Starting PostgreSQL, NATS, orders, payments and gateway as separate processes ...");
    let timers = TIMERS
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec();
    let binaries = std::env::current_exe()?
        .parent()
        .context("this program is in a folder")?
        .to_owned();
    let mut stack = TestStack::start_in(&binaries, timers).await?;
    let databases = checks::databases(&stack.system).await?;
    let http = Http::new(stack.system.address("gateway"));

    let mut shop = Shop {
        http,
        orders: Vec::new(),
    };
    until_done(
        &shop.http,
        "/v1/accounts",
        &json!({ "user_id": "alice" }),
        WITHIN,
    )
    .await?;
    let deposit = json!({ "amount": AFFORDABLE * PRICE });
    let paid_in = until_done(&shop.http, "/v1/accounts/alice/deposits", &deposit, WITHIN)
        .await?
        .json();
    let money = paid_in["balance"].as_i64().context("a balance")?;
    printer.say(format!(
        "Alice has {money}. She places {ORDERS} orders of {PRICE} each: her money is enough for {}.",
        money / PRICE
    ));

    while shop.orders.len() < REPEAT_AFTER {
        shop.order().await?;
    }
    shop.until(|final_ones| final_ones == REPEAT_AFTER).await?;
    printer.orders(&shop, "are paid.");

    let broker = operator(&stack.system).await?;
    repeat(&broker, REPEATED).await?;
    let repeats = "SELECT coalesce(sum(repeats), 0)::bigint FROM inbox WHERE consumer = 'payments-order-placed'";
    until(async || Ok(count(&databases.payments, repeats).await? >= REPEATED as i64))
        .await
        .context("payments has not received the duplicates")?;
    let recognised = count(&databases.payments, repeats).await?;
    let debits = count(&databases.payments, DEBITS).await?;
    printer.fault(format!(
        "The requests for orders 1 and {REPEATED} are delivered a second time."
    ));
    printer.say(format!(
        "Payments recognises {recognised} duplicates. There are still {debits} debits."
    ));

    while shop.orders.len() < KILL_AT {
        shop.order().await?;
    }
    let pid = stack.system.pid("payments").context("payments runs")?;
    stack.system.kill("payments").await?;
    printer.fault(format!(
        "Order {KILL_AT} is placed, and payments is killed at that moment: kill -9 {pid}."
    ));
    while shop.orders.len() < ORDERS {
        shop.order().await?;
    }
    shop.refresh().await?;
    printer.orders(
        &shop,
        "are accepted anyway. The open ones wait for payments.",
    );

    let nothing_waits = "SELECT count(*) FROM outbox WHERE published_at IS NULL";
    until(async || Ok(count(&databases.orders, nothing_waits).await? == 0))
        .await
        .context("the requests were not published")?;
    let stored = stored_messages(&broker).await?;
    drop(broker);
    stack.system.kill("nats").await?;
    stack.system.wipe_nats()?;
    printer.fault(format!(
        "The broker is killed and its disk is wiped: {stored} acknowledged messages are gone."
    ));
    stack.system.start("nats").await?;
    stack.system.start("payments").await?;
    printer.say("The broker restarts, empty. Payments restarts. Nobody intervenes.");

    shop.until(|final_ones| final_ones == ORDERS).await?;
    let asked_again = count(
        &databases.orders,
        "SELECT count(*) FROM orders WHERE asks > 0",
    )
    .await?;
    printer.say(format!(
        "Orders has re-asked for {asked_again} orders that stayed NEW."
    ));
    printer.orders(&shop, "are final.");

    let verdict = audited(&databases, &shop).await?;
    printer.summary(&verdict);
    stack.system.stop_all().await?;
    Ok(if verdict.is_good() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Alice's orders and their last known status.
struct Shop {
    http: Http,
    orders: Vec<(String, Value)>,
}

impl Shop {
    async fn order(&mut self) -> anyhow::Result<()> {
        let order = until_done(
            &self.http,
            "/v1/orders",
            &json!({ "user_id": "alice", "amount": PRICE }),
            WITHIN,
        )
        .await?
        .json();
        let id = order["id"]
            .as_str()
            .context("an order has an id")?
            .to_owned();
        self.orders.push((id, order["status"].clone()));
        Ok(())
    }

    async fn refresh(&mut self) -> anyhow::Result<()> {
        for (id, status) in self.orders.iter_mut().filter(|(_, status)| status == "NEW") {
            *status = self.http.get(&format!("/v1/orders/{id}")).await?.json()["status"].clone();
        }
        Ok(())
    }

    fn count(&self, status: &str) -> usize {
        self.orders
            .iter()
            .filter(|(_, other)| other == status)
            .count()
    }

    fn final_ones(&self) -> usize {
        self.count("FINISHED") + self.count("CANCELLED")
    }

    async fn until(&mut self, enough: impl Fn(usize) -> bool) -> anyhow::Result<()> {
        let deadline = Instant::now() + WITHIN;
        loop {
            self.refresh().await?;
            if enough(self.final_ones()) {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "after {WITHIN:?} only {} of {} are final",
                self.final_ones(),
                self.orders.len()
            );
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }
}

/// Publishes the oldest requests again under new message ids, so that the broker does not
/// deduplicate them.
async fn repeat(broker: &Broker, messages: u64) -> anyhow::Result<()> {
    let stream = broker.jetstream().get_stream("ORDERS").await?;
    let mut sequence = stream.cached_info().state.first_sequence;
    let mut repeated = 0;
    while repeated < messages {
        let message = stream
            .get_raw_message(sequence)
            .await
            .context("a message of the stream")?;
        sequence += 1;
        // The stream also contains other events of orders.
        if message.subject.as_str() != "gozon.orders.placed" {
            continue;
        }
        let mut headers = message.headers.clone();
        headers.insert("Nats-Msg-Id", Uuid::new_v4().to_string());
        let ack = broker
            .jetstream()
            .publish_with_headers(message.subject, headers, message.payload)
            .await?;
        ensure!(
            !ack.await?.duplicate,
            "the broker has dropped the message as a duplicate"
        );
        repeated += 1;
    }
    Ok(())
}

/// The number of messages in the streams.
async fn stored_messages(broker: &Broker) -> anyhow::Result<u64> {
    let mut stored = 0;
    for name in ["ORDERS", "PAYMENTS"] {
        let stream: jetstream::stream::Stream = broker.jetstream().get_stream(name).await?;
        stored += stream.cached_info().state.messages;
    }
    Ok(stored)
}

async fn until(mut check: impl AsyncFnMut() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let deadline = Instant::now() + WITHIN;
    while !check().await? {
        ensure!(Instant::now() < deadline, "not within {WITHIN:?}");
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
    Ok(())
}

const DEBITS: &str = "SELECT count(*) FROM transfers WHERE kind = 'payment'";

async fn count(db: &DatabaseConnection, sql: &str) -> anyhow::Result<i64> {
    let row = db
        .query_one_raw(Statement::from_string(DbBackend::Postgres, sql))
        .await?;
    Ok(row.context("a count is one row")?.try_get_by_index(0)?)
}

/// The result of the audit, and Alice's balance.
struct Verdict {
    report: audit::Report,
    debits: i64,
    balance: i64,
    expected_balance: i64,
}

async fn audited(databases: &Databases, shop: &Shop) -> anyhow::Result<Verdict> {
    let options = audit::Options {
        grace: Duration::from_secs(4),
        late_after: Duration::ZERO,
        stuck_after: Duration::ZERO,
    };
    let report = audit::audit(databases, options).await?;
    let debits = count(&databases.payments, DEBITS).await?;
    let account = shop.http.get("/v1/accounts/alice").await?.json();
    let balance = account["balance"].as_i64().context("a balance")?;
    Ok(Verdict {
        report,
        debits,
        balance,
        expected_balance: (AFFORDABLE - shop.count("FINISHED") as i64) * PRICE,
    })
}

impl Verdict {
    fn number(&self, kinds: &[FindingKind]) -> usize {
        self.report
            .findings
            .iter()
            .filter(|finding| kinds.contains(&finding.kind))
            .count()
    }

    fn status(&self, status: &str) -> u64 {
        self.report
            .by_status
            .get(status)
            .copied()
            .unwrap_or_default()
    }

    fn final_ones(&self) -> u64 {
        self.status("FINISHED") + self.status("CANCELLED")
    }

    fn balances_are_exact(&self) -> bool {
        let kinds = [
            FindingKind::BalanceDrift,
            FindingKind::NegativeBalance,
            FindingKind::BrokenStatement,
            FindingKind::MalformedTransfer,
        ];
        self.balance == self.expected_balance && self.number(&kinds) == 0
    }

    fn is_good(&self) -> bool {
        self.report.findings.is_empty()
            && self.report.orders == ORDERS as u64
            && self.final_ones() == ORDERS as u64
            && self.debits == AFFORDABLE
            && self.balances_are_exact()
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let exact = if self.balances_are_exact() {
            "balances exact"
        } else {
            "BALANCES WRONG"
        };
        let doubled = self.number(&[FindingKind::DoubledDebit]);
        write!(
            f,
            "{} final, {} debits, {doubled} twice, {exact}",
            self.final_ones(),
            self.debits
        )
    }
}

/// Prints what happens.
struct Printer {
    begun: Instant,
    colours: bool,
}

impl Printer {
    fn title(&self, words: &str) {
        self.print(&format!("\n{}\n", self.in_colour("1", words)));
    }

    fn say(&self, words: impl AsRef<str>) {
        self.print(&format!(
            "{:>5.1} s  {}",
            self.begun.elapsed().as_secs_f32(),
            words.as_ref()
        ));
    }

    fn fault(&self, words: impl AsRef<str>) {
        self.say(self.in_colour("31", &format!("✗ {}", words.as_ref())));
    }

    /// Prints one mark for each order.
    fn orders(&self, shop: &Shop, words: &str) {
        let marks: String = shop
            .orders
            .iter()
            .map(|(_, status)| match status.as_str() {
                Some("FINISHED") => self.in_colour("32", "●"),
                Some("CANCELLED") => self.in_colour("33", "◌"),
                _ => "·".to_owned(),
            })
            .collect();
        self.say(format!("{marks} {} orders {words}", shop.orders.len()));
    }

    fn summary(&self, verdict: &Verdict) {
        let Verdict {
            report,
            debits,
            balance,
            expected_balance,
        } = verdict;
        self.print("");
        self.print("  Result, read from both databases:");
        self.print(&format!(
            "    {} orders: {} FINISHED ●, {} CANCELLED ◌ (insufficient funds), {} NEW",
            report.orders,
            verdict.status("FINISHED"),
            verdict.status("CANCELLED"),
            verdict.status("NEW")
        ));
        self.print(&format!(
            "    {} decisions, {debits} debits of {PRICE}",
            report.decisions
        ));
        self.print(&format!(
            "    Alice has {balance}; expected: {expected_balance}"
        ));
        for finding in &report.findings {
            self.print(&self.in_colour(
                "31",
                &format!("    {} {}: {}", finding.kind, finding.id, finding.detail),
            ));
        }
        let colour = if verdict.is_good() { "1;32" } else { "1;31" };
        let took = self.begun.elapsed().as_secs_f32();
        self.print(&format!(
            "\n{}  ({took:.1} s)",
            self.in_colour(colour, &format!("{verdict}."))
        ));
    }

    fn in_colour(&self, colour: &str, words: &str) -> String {
        if self.colours {
            format!("\u{1b}[{colour}m{words}\u{1b}[0m")
        } else {
            words.to_owned()
        }
    }

    fn print(&self, line: &str) {
        let mut out = std::io::stdout();
        // The reader may close the pipe; the exit code still shows the result.
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    }
}
