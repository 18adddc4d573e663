//! Simulated customers: they order, deposit, retry what was not answered, and record every
//! exchange.

use std::cell::{Cell, RefCell};
use std::path::Path;
use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use ops::history::{Exchange, History};
use serde_json::{Value, json};
use stack::http::Http;
use stack::seed::Seed;
use tokio::time::Instant;

/// Longer than the gateway's own timeout.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
const IN_FLIGHT_MAX: usize = 64;
const RETRY_DELAY_MIN: Duration = Duration::from_millis(50);
const RETRY_DELAY_MAX: Duration = Duration::from_secs(1);
const READ_INTERVAL: Duration = Duration::from_millis(50);
const ORDER_AMOUNT_MAX: u64 = 50;
const DEPOSIT_AMOUNT_MAX: u64 = 300;

/// The minimum load. The customers continue at the same rate until [`Customers::close`].
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub users: u64,
    /// Each has its own key.
    pub orders: u64,
    /// Each has its own key.
    pub deposits: u64,
    /// The time over which they are spread.
    pub over: Duration,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Orders whose first request was sent.
    pub orders_begun: u64,
    /// Deposits whose first request was sent.
    pub deposits_begun: u64,
    /// Orders answered with 2xx.
    pub orders: u64,
    /// Deposits answered with 2xx.
    pub deposits: u64,
    /// Requests with an unknown outcome.
    pub unknown: u64,
}

/// The customers. They share one gateway and one record.
pub struct Customers {
    http: Http,
    begun: Instant,
    exchanges: RefCell<Vec<Exchange>>,
    counts: Cell<Counts>,
    /// Orders that were not final when last read.
    open_orders: RefCell<Vec<String>>,
    final_orders: RefCell<Vec<String>>,
    closing: Cell<bool>,
    /// Nothing is retried after this.
    give_up_at: Cell<Option<Instant>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AnswerKind {
    Done,
    Refused,
    Unknown,
}

impl Customers {
    /// Customers of the gateway at this address.
    pub fn new(front: &str) -> Self {
        Self {
            http: Http::new(front),
            begun: Instant::now(),
            exchanges: RefCell::default(),
            counts: Cell::default(),
            open_orders: RefCell::default(),
            final_orders: RefCell::default(),
            closing: Cell::new(false),
            give_up_at: Cell::new(None),
        }
    }

    pub fn counts(&self) -> Counts {
        self.counts.get()
    }

    /// From now on, sends only what is still planned, and stops retrying at `give_up_at`.
    pub fn close(&self, give_up_at: Instant) {
        self.closing.set(true);
        self.give_up_at.set(Some(give_up_at));
    }

    pub fn into_history(self) -> History {
        History {
            exchanges: self.exchanges.into_inner(),
        }
    }

    /// Opens the accounts, then orders and deposits until every request is answered.
    pub async fn shop(&self, plan: Plan, mut seed: Seed) {
        stream::iter(0..plan.users)
            .for_each_concurrent(IN_FLIGHT_MAX, |user| {
                let mut seed = seed.clone();
                async move {
                    let body = json!({ "user_id": user_id(user) });
                    self.retry_until_done(
                        "/v1/accounts",
                        &format!("account-{user}"),
                        &body,
                        &mut seed,
                    )
                    .await;
                }
            })
            .await;
        let mut planned: Vec<bool> = (0..plan.orders + plan.deposits)
            .map(|number| number < plan.orders)
            .collect();
        seed.shuffle(&mut planned);
        let each = plan
            .over
            .div_f64((plan.orders + plan.deposits).max(1) as f64);
        let begun = Instant::now();
        let requests = (0_u32..).map_while(|number| {
            let planned = planned.get(usize::try_from(number).ok()?).copied();
            let is_order = planned.or_else(|| {
                (!self.closing.get()).then(|| seed.below(plan.orders + plan.deposits) < plan.orders)
            })?;
            Some((number, is_order, seed.fork()))
        });
        stream::iter(requests)
            .for_each_concurrent(IN_FLIGHT_MAX, |(number, is_order, seed)| async move {
                tokio::time::sleep_until(begun + each * number).await;
                self.send_one(number, is_order, plan.users, seed).await;
            })
            .await;
    }

    /// Sends one order or deposit and retries it until it is done. Some requests are sent twice
    /// concurrently, some are repeated, some are repeated with different content.
    async fn send_one(&self, number: u32, is_order: bool, users: u64, mut seed: Seed) {
        let mut counts = self.counts.get();
        *(if is_order {
            &mut counts.orders_begun
        } else {
            &mut counts.deposits_begun
        }) += 1;
        self.counts.set(counts);
        let user = user_id(seed.below(users));
        let key = format!(
            "{}-{number}-{:016x}",
            if is_order { "order" } else { "deposit" },
            seed.number()
        );
        let (path, body, other) = if is_order {
            let body = |amount: u64| json!({ "user_id": user, "amount": amount, "description": format!("wish {number}") });
            let amount = 1 + seed.below(ORDER_AMOUNT_MAX);
            ("/v1/orders".to_owned(), body(amount), body(amount + 1))
        } else {
            let amount = 1 + seed.below(DEPOSIT_AMOUNT_MAX);
            (
                format!("/v1/accounts/{user}/deposits"),
                json!({ "amount": amount }),
                json!({ "amount": amount + 1 }),
            )
        };
        let roll = seed.below(100);
        let done = if roll < 3 {
            let (mut one, mut twin) = (seed.fork(), seed.fork());
            let done = tokio::join!(
                self.retry_until_done(&path, &key, &body, &mut one),
                self.retry_until_done(&path, &key, &body, &mut twin)
            );
            done.0.or(done.1)
        } else {
            self.retry_until_done(&path, &key, &body, &mut seed).await
        };
        let Some(done) = done else { return };
        let mut counts = self.counts.get();
        if is_order {
            counts.orders += 1;
            let answer: Value = serde_json::from_str(&done.answer).unwrap_or_default();
            self.open_orders
                .borrow_mut()
                .extend(answer["id"].as_str().map(str::to_owned));
        } else {
            counts.deposits += 1;
        }
        self.counts.set(counts);
        match roll {
            3..8 => drop(self.ask("POST", &path, Some(&key), &body).await),
            8..10 => drop(self.ask("POST", &path, Some(&key), &other).await),
            _ => {}
        }
    }

    /// Retries a POST under its key until it is done or rejected.
    async fn retry_until_done(
        &self,
        path: &str,
        key: &str,
        body: &Value,
        seed: &mut Seed,
    ) -> Option<Exchange> {
        let mut delay = RETRY_DELAY_MIN;
        loop {
            let exchange = self.ask("POST", path, Some(key), body).await;
            match answer_kind(&exchange) {
                AnswerKind::Done => return Some(exchange),
                AnswerKind::Refused => return None,
                AnswerKind::Unknown => {}
            }
            let mut counts = self.counts.get();
            counts.unknown += 1;
            self.counts.set(counts);
            if self
                .give_up_at
                .get()
                .is_some_and(|moment| Instant::now() > moment)
            {
                return None;
            }
            tokio::time::sleep(delay.mul_f64(0.5 + seed.fraction() / 2.0)).await;
            delay = (delay * 2).min(RETRY_DELAY_MAX);
        }
    }

    /// Reads orders and balances for ever.
    pub async fn watch(&self, users: u64, mut seed: Seed) {
        loop {
            let pick = |list: &RefCell<Vec<String>>, number: u64| {
                let list = list.borrow();
                list.get(usize::try_from(number).unwrap_or(0) % list.len().max(1))
                    .cloned()
            };
            let (roll, number) = (seed.below(10), seed.number());
            let order = match roll {
                0 | 1 => None,
                2 => pick(&self.final_orders, number),
                _ => pick(&self.open_orders, number),
            };
            match order {
                None => drop(
                    self.ask(
                        "GET",
                        &format!("/v1/accounts/{}", user_id(seed.below(users))),
                        None,
                        &Value::Null,
                    )
                    .await,
                ),
                Some(id) => {
                    let read = self
                        .ask("GET", &format!("/v1/orders/{id}"), None, &Value::Null)
                        .await;
                    let answer: Value = serde_json::from_str(&read.answer).unwrap_or_default();
                    if roll > 2
                        && matches!(answer["status"].as_str(), Some("FINISHED" | "CANCELLED"))
                    {
                        self.open_orders.borrow_mut().retain(|other| *other != id);
                        self.final_orders.borrow_mut().push(id);
                    }
                }
            }
            tokio::time::sleep(READ_INTERVAL).await;
        }
    }

    /// Repeats at most `at_most` POSTs that were done, under their keys, spread evenly over the
    /// record.
    pub async fn repeat(&self, at_most: usize) {
        let done: Vec<Exchange> = self
            .exchanges
            .borrow()
            .iter()
            .filter(|exchange| {
                exchange.method == "POST" && answer_kind(exchange) == AnswerKind::Done
            })
            .cloned()
            .collect();
        let step = done.len().div_ceil(at_most.max(1)).max(1);
        stream::iter(done.iter().step_by(step))
            .for_each_concurrent(IN_FLIGHT_MAX, |exchange| async move {
                self.ask(
                    "POST",
                    &exchange.path,
                    exchange.key.as_deref(),
                    &exchange.body,
                )
                .await;
            })
            .await;
    }

    /// Reads every order and every balance once.
    pub async fn read_everything(&self, users: u64) -> anyhow::Result<()> {
        let mut cursor = String::new();
        loop {
            let page = self
                .ask(
                    "GET",
                    &format!("/v1/orders?limit=100{cursor}"),
                    None,
                    &Value::Null,
                )
                .await;
            anyhow::ensure!(
                page.status == Some(200),
                "the orders cannot be listed: {page:?}"
            );
            match serde_json::from_str::<Value>(&page.answer)?["next_cursor"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => break,
            }
        }
        for user in 0..users {
            self.ask(
                "GET",
                &format!("/v1/accounts/{}", user_id(user)),
                None,
                &Value::Null,
            )
            .await;
        }
        Ok(())
    }

    async fn ask(&self, method: &str, path: &str, key: Option<&str>, body: &Value) -> Exchange {
        let micros =
            |begun: Instant| u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        let begun_us = micros(self.begun);
        let asked = async {
            match method {
                "GET" => self.http.get(path).await,
                _ => self.http.post(path, key, body).await,
            }
        };
        let answer = tokio::time::timeout(ANSWER_TIMEOUT, asked)
            .await
            .ok()
            .and_then(Result::ok);
        let exchange = Exchange {
            begun_us,
            ended_us: micros(self.begun),
            method: method.to_owned(),
            path: path.to_owned(),
            key: key.map(str::to_owned),
            body: body.clone(),
            status: answer.as_ref().map(|answer| answer.status),
            replayed: answer
                .as_ref()
                .is_some_and(|answer| answer.header("idempotency-replayed") == Some("true")),
            answer: answer.map(|answer| answer.text()).unwrap_or_default(),
        };
        self.exchanges.borrow_mut().push(exchange.clone());
        exchange
    }
}

/// Writes a history in the format of `gozon audit --history`.
pub fn write(history: &History, path: &Path) -> anyhow::Result<()> {
    let mut text = String::new();
    for exchange in &history.exchanges {
        text.push_str(&serde_json::to_string(exchange)?);
        text.push('\n');
    }
    Ok(std::fs::write(path, text)?)
}

fn user_id(number: u64) -> String {
    format!("customer-{number}")
}

fn answer_kind(exchange: &Exchange) -> AnswerKind {
    match exchange.status {
        Some(200..300) => AnswerKind::Done,
        // A concurrent request with the same key is in progress.
        Some(409) | None => AnswerKind::Unknown,
        Some(429) => AnswerKind::Unknown,
        Some(400..500) => AnswerKind::Refused,
        Some(_) => AnswerKind::Unknown,
    }
}
