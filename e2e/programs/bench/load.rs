//! Load through the gateway; results are read from the databases.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use futures_util::future::try_join_all;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use sea_orm::{ConnectionTrait as _, DatabaseConnection, DbBackend, FromQueryResult, Statement};
use serde_json::json;
use stack::http::Http;
use time::OffsetDateTime;
use tokio::sync::mpsc;
use uuid::Uuid;

/// Each client waits for the answer before it sends the next order.
pub(crate) const CLIENTS: usize = 64;
pub(crate) const USERS: usize = 1000;
pub(crate) const SETTLED_WITHIN: Duration = Duration::from_secs(120);
pub(crate) const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// The result of a closed loop of clients.
#[derive(Clone, Debug, Default)]
pub(crate) struct Saturation {
    pub(crate) accepted_per_s: f64,
    pub(crate) finished_per_s: f64,
    pub(crate) orders: u64,
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
    /// Accepted and finished orders in each second.
    pub(crate) over_time: Vec<(u64, u64)>,
}

/// Places as many orders as possible from `CLIENTS` clients, spread over `users` customers, and
/// waits until all are final.
pub(crate) async fn saturate(
    gateways: &[Http],
    orders: &DatabaseConnection,
    users: usize,
    time: Duration,
) -> anyhow::Result<Saturation> {
    let before = newest(orders).await?;
    let begun = Instant::now();
    let clients = (0..CLIENTS).map(async |client| {
        let http = &gateways[client % gateways.len()];
        let mut number = client;
        while begun.elapsed() < time {
            place(http, &format!("user-{}", number % users)).await?;
            number += CLIENTS + 1;
        }
        anyhow::Ok(())
    });
    try_join_all(clients).await?;
    until_settled(orders).await?;

    #[derive(FromQueryResult)]
    struct Row {
        number: i64,
        accepting: f64,
        finishing: f64,
        p50: f64,
        p99: f64,
    }
    let row = Row::find_by_statement(Statement::from_sql_and_values(
        DbBackend::Postgres,
        "SELECT count(*) AS number,
                extract(epoch FROM max(created_at) - min(created_at))::float8 AS accepting,
                extract(epoch FROM max(updated_at) - min(created_at))::float8 AS finishing,
                1000 * percentile_cont(0.5) WITHIN GROUP (ORDER BY extract(epoch FROM updated_at - created_at)::float8) AS p50,
                1000 * percentile_cont(0.99) WITHIN GROUP (ORDER BY extract(epoch FROM updated_at - created_at)::float8) AS p99
         FROM orders WHERE id > $1",
        [before.into()],
    ));
    let row = row.one(orders).await?.context("an aggregate has one row")?;
    #[derive(FromQueryResult)]
    struct Second {
        accepted: i64,
        finished: i64,
    }
    let seconds = Second::find_by_statement(Statement::from_sql_and_values(
        DbBackend::Postgres,
        "WITH placed AS (SELECT created_at, updated_at, min(created_at) OVER () AS start FROM orders WHERE id > $1),
              accepted AS (SELECT floor(extract(epoch FROM created_at - start))::int AS second, count(*) AS n FROM placed GROUP BY 1),
              finished AS (SELECT floor(extract(epoch FROM updated_at - start))::int AS second, count(*) AS n FROM placed GROUP BY 1)
         SELECT coalesce(a.n, 0) AS accepted, coalesce(f.n, 0) AS finished
         FROM accepted a FULL JOIN finished f USING (second) ORDER BY second",
        [before.into()],
    ));
    let over_time = seconds.all(orders).await?;
    Ok(Saturation {
        accepted_per_s: row.number as f64 / row.accepting,
        finished_per_s: row.number as f64 / row.finishing,
        orders: row.number.unsigned_abs(),
        p50_ms: row.p50,
        p99_ms: row.p99,
        over_time: over_time
            .iter()
            .map(|one| (one.accepted.unsigned_abs(), one.finished.unsigned_abs()))
            .collect(),
    })
}

/// Places orders as fast as possible, without waiting until they are final.
pub(crate) async fn place_all(http: &Http, number: usize) -> anyhow::Result<()> {
    let all = stream::iter(0..number)
        .map(async |number| place(http, &format!("user-{}", number % USERS)).await);
    all.buffer_unordered(CLIENTS)
        .fold(Ok(()), async |all, one| all.and(one.map(|_| ())))
        .await
}

/// An order whose client waited until it was final.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TimedOrder {
    pub(crate) id: Uuid,
    /// When it was due to be sent.
    pub(crate) due: OffsetDateTime,
    /// When the answer arrived that it is final.
    pub(crate) answered: OffsetDateTime,
}

impl TimedOrder {
    pub(crate) fn milliseconds(&self) -> f64 {
        (self.answered - self.due).as_seconds_f64() * 1000.0
    }
}

/// Sends orders at a fixed rate, each when it is due, however slow the earlier ones are. Waits
/// until each is final.
pub(crate) async fn open_loop(
    http: &Http,
    per_second: u32,
    time: Duration,
) -> anyhow::Result<Vec<TimedOrder>> {
    let number = per_second * u32::try_from(time.as_secs())?;
    let (ticks, mut ticking) = mpsc::unbounded_channel();
    // A separate thread keeps time: the runtime's timers are up to a millisecond late, which would
    // count as latency.
    let clock = std::thread::spawn(move || {
        let begun = Instant::now();
        for number in 0..number {
            let until_due = begun + Duration::from_secs(1) * number / per_second;
            std::thread::sleep(until_due.saturating_duration_since(Instant::now()));
            let late = until_due.elapsed();
            // The receiver is gone once an order has failed.
            if ticks
                .send((number, OffsetDateTime::now_utc() - late))
                .is_err()
            {
                break;
            }
        }
    });
    let orders =
        stream::poll_fn(move |context| ticking.poll_recv(context)).map(async |(number, due)| {
            let id = place(http, &format!("user-{}", number as usize % USERS)).await?;
            let answer = http.get(&format!("/v1/orders/{id}?wait=30")).await?;
            let answered = OffsetDateTime::now_utc();
            match answer.json()["status"].as_str() {
                Some("FINISHED") => Ok(TimedOrder {
                    id: id.parse()?,
                    due,
                    answered,
                }),
                _ => bail!("order {id} did not finish: {}", answer.text()),
            }
        });
    let waited = orders
        .buffer_unordered(number.max(1) as usize)
        .try_collect()
        .await;
    clock
        .join()
        .map_err(|_| anyhow::anyhow!("the thread that keeps time has panicked"))?;
    waited
}

async fn place(http: &Http, user: &str) -> anyhow::Result<String> {
    let body = json!({ "user_id": user, "amount": 1, "description": "A lamp" });
    let answer = http
        .post("/v1/orders", Some(&Uuid::new_v4().to_string()), &body)
        .await?;
    // 429 and 503 are errors too: rejected orders would make the others look fast.
    anyhow::ensure!(
        answer.status == 201,
        "an order was answered with {}: {}",
        answer.status,
        answer.text()
    );
    answer.json()["id"]
        .as_str()
        .map(str::to_owned)
        .context("an order has an id")
}

/// The id of the newest order.
pub(crate) async fn newest(orders: &DatabaseConnection) -> anyhow::Result<Uuid> {
    let row = orders
        .query_one_raw(Statement::from_string(
            DbBackend::Postgres,
            "SELECT max(id::text)::uuid AS id FROM orders",
        ))
        .await?;
    Ok(row
        .context("an aggregate has one row")?
        .try_get::<Option<Uuid>>("", "id")?
        .unwrap_or_default())
}

/// Waits until no order is NEW.
pub(crate) async fn until_settled(orders: &DatabaseConnection) -> anyhow::Result<()> {
    until(
        orders,
        "SELECT NOT EXISTS (SELECT 1 FROM orders WHERE status = 'NEW')",
    )
    .await
}

/// Waits until a query returns true.
pub(crate) async fn until(db: &DatabaseConnection, query: &str) -> anyhow::Result<()> {
    let begun = Instant::now();
    loop {
        let row = db
            .query_one_raw(Statement::from_string(DbBackend::Postgres, query))
            .await?;
        if row
            .context("the query returns one row")?
            .try_get_by_index::<bool>(0)?
        {
            return Ok(());
        }
        anyhow::ensure!(
            begun.elapsed() < SETTLED_WITHIN,
            "not within {SETTLED_WITHIN:?}: {query}"
        );
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}
