//! Listeners to the events of one user cost the gateway nothing for the events of others.
//!
//! The short form runs with few events. `GOZON_LONG=1` runs the full form.

use std::fs;

use async_nats::HeaderMap;
use broker::Broker;
use futures_util::future::join_all;
use serde_json::json;
use shared_contracts::{Event as _, OrderFinished, header};
use stack::http::{Http, StreamingResponse};
use stack::testing::eventually;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::time::timeout;
use uuid::Uuid;

use crate::shop::{SOON, Shop};

/// Messages per atomic batch.
const BATCH: usize = 1000;
/// Publishes, for each number, the final event of an order of user `u<number>`.
async fn publish(operator: &Broker, numbers: &[usize]) -> u64 {
    let mut sequence = 0;
    for batch in numbers.chunks(BATCH) {
        let id = Uuid::now_v7().to_string();
        for (index, number) in batch.iter().enumerate() {
            let now = OffsetDateTime::now_utc().format(&Rfc3339).unwrap();
            let mut headers = HeaderMap::new();
            headers.insert(header::ID, Uuid::now_v7().to_string());
            headers.insert(header::TYPE, OrderFinished::TYPE);
            headers.insert(header::TIME, now);
            headers.insert("Nats-Batch-Id", id.as_str());
            headers.insert("Nats-Batch-Sequence", (index + 1).to_string());
            let body = json!({
                "order_id": Uuid::now_v7(), "user_id": format!("u{number}"), "amount": 1
            });
            let body = body.to_string().into();
            if index + 1 < batch.len() {
                let client = operator.client();
                let sent = client.publish_with_headers(OrderFinished::SUBJECT, headers, body);
                sent.await.unwrap();
            } else {
                headers.insert("Nats-Batch-Commit", "1");
                let jetstream = operator.jetstream();
                let sent = jetstream.publish_with_headers(OrderFinished::SUBJECT, headers, body);
                sequence = sent.await.unwrap().await.unwrap().sequence;
            }
        }
    }
    sequence
}

async fn listen(http: &Http, user: usize) -> StreamingResponse {
    let path = format!("/v1/orders/events?user_id=u{user}");
    let mut stream = http.open(&path, &[]).await.unwrap();
    assert_eq!(stream.status, 200);
    timeout(SOON, stream.next()).await.unwrap().unwrap();
    stream
}

/// Reads until an order event arrives.
async fn hear(stream: &mut StreamingResponse) {
    let mut text = String::new();
    while !text.contains("event: order") {
        let bytes = timeout(SOON, stream.next()).await.unwrap();
        text.push_str(std::str::from_utf8(&bytes.expect("the stream has not ended")).unwrap());
        assert!(!text.contains("event: reset"), "{text}");
    }
}

/// Waits until the gateway has read the stream up to this sequence: a new listener gets the current
/// position.
async fn until_read(http: &Http, sequence: u64) {
    eventually("the gateway has read all events", SOON, async || {
        let mut stream = http
            .open("/v1/orders/events?user_id=nobody", &[])
            .await
            .ok()?;
        let hello = String::from_utf8(stream.next().await?.to_vec()).unwrap();
        let id = hello.lines().find_map(|line| line.strip_prefix("id: "))?;
        let here: u64 = id.split('.').next()?.parse().ok()?;
        (here >= sequence).then_some(())
    })
    .await;
}

/// Total processor time of a process, in clock ticks.
fn ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let (_, fields) = stat.rsplit_once(") ").unwrap();
    let times = fields.split(' ').skip(11).take(2);
    times.map(|ticks| ticks.parse::<u64>().unwrap()).sum()
}

#[tokio::test]
async fn f64_listeners_to_other_users_cost_the_gateway_less_than_a_tenth_more() {
    let long = std::env::var_os("GOZON_LONG").is_some();
    let (listeners, events) = if long { (500, 200_000) } else { (50, 20_000) };
    // One event for each user with a listener, spread evenly among events of users without one.
    let users: Vec<usize> = (0..events)
        .map(|number| match number % (events / listeners) {
            0 => number / (events / listeners),
            _ => usize::MAX,
        })
        .collect();
    let mut shop = Shop::start().await;
    let operator = shop.operator().await;
    let pid = shop.stack.system.pid("gateway").unwrap();
    // The first events include one-time costs, so they are not measured.
    let warm = publish(&operator, &users).await;
    until_read(&shop.http, warm).await;

    let (mut alone, mut listened) = (u64::MAX, u64::MAX);
    // Each measurement may be off by one tick.
    let cheap = |alone: u64, listened: u64| listened * 10 <= alone * 11 + 10;
    // Other programs on the machine can only increase a figure, so the minimum counts.
    for _ in 0..5 {
        let before = ticks(pid);
        let last = publish(&operator, &users).await;
        until_read(&shop.http, last).await;
        alone = alone.min(ticks(pid) - before);

        let http = &shop.http;
        let mut streams = join_all((0..listeners).map(|user| listen(http, user))).await;
        let before = ticks(pid);
        let hearing = streams.iter_mut().map(hear);
        let (last, _) = tokio::join!(publish(&operator, &users), join_all(hearing));
        until_read(http, last).await;
        listened = listened.min(ticks(pid) - before);
        if cheap(alone, listened) {
            break;
        }
    }
    println!("{events} events: {alone} ticks, with {listeners} listeners {listened}");
    assert!(
        cheap(alone, listened),
        "{alone} ticks without listeners, {listened} with {listeners}"
    );
}
