//! Live status: the order events that a browser receives, through any gateway, with faults in
//! between.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use async_nats::HeaderMap;
use futures_util::future::join_all;
use serde_json::{Value, json};
use shared_contracts::{Event as _, OrderFinished, header};
use stack::http::{Http, StreamingResponse};
use stack::ports::free_port;
use stack::process::{Process, Program};
use stack::testing::{eventually, service_program};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpSocket;
use tokio::time::{Instant, timeout};
use uuid::Uuid;

use crate::shop::{SOON, Shop};

/// A minimal EventSource.
struct Listener {
    stream: StreamingResponse,
    text: String,
    ready: VecDeque<ReceivedEvent>,
    last_event_id: Option<String>,
}

#[derive(Clone, Debug, PartialEq)]
struct ReceivedEvent {
    kind: String,
    data: Value,
}

impl ReceivedEvent {
    fn order(&self) -> (String, String) {
        (
            self.data["order_id"].as_str().unwrap().to_owned(),
            self.data["status"].as_str().unwrap().to_owned(),
        )
    }
}

impl Listener {
    async fn open(http: &Http, path: &str, last_event_id: Option<&str>) -> Self {
        let headers: Vec<(&str, &str)> = last_event_id
            .iter()
            .map(|id| ("last-event-id", *id))
            .collect();
        let stream = http.open(path, &headers).await.unwrap();
        assert_eq!(
            (stream.status, stream.content_type.as_str()),
            (200, "text/event-stream"),
            "{path}"
        );
        let mut listener = Self {
            stream,
            text: String::new(),
            ready: VecDeque::new(),
            last_event_id: last_event_id.map(str::to_owned),
        };
        // The server's first line confirms that it delivers events from now on.
        assert!(
            timeout(SOON, listener.read()).await.unwrap(),
            "{path} ends at once"
        );
        listener
    }

    /// Reads more; returns false if the stream has ended.
    async fn read(&mut self) -> bool {
        let Some(bytes) = self.stream.next().await else {
            return false;
        };
        self.text.push_str(std::str::from_utf8(&bytes).unwrap());
        while let Some((block, rest)) = self.text.split_once("\n\n") {
            let field = |name: &str| {
                block
                    .lines()
                    .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
            };
            if let Some(id) = field("id") {
                self.last_event_id = Some(id.to_owned());
            }
            if let Some(data) = field("data") {
                let kind = field("event").unwrap_or("message").to_owned();
                self.ready.push_back(ReceivedEvent {
                    kind,
                    data: serde_json::from_str(data).unwrap(),
                });
            }
            self.text = rest.to_owned();
        }
        true
    }

    /// The next event; `None` if the stream has ended.
    async fn next(&mut self) -> Option<ReceivedEvent> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            if !self.read().await {
                return None;
            }
        }
    }

    async fn next_soon(&mut self) -> ReceivedEvent {
        timeout(SOON, self.next())
            .await
            .expect("an event arrives in time")
            .expect("the stream has not ended")
    }

    /// All events until this order is final.
    async fn until_final(&mut self, order_id: &str) -> Vec<ReceivedEvent> {
        let mut received = Vec::new();
        loop {
            let event = self.next_soon().await;
            let last = event.kind == "order"
                && event.data["order_id"] == order_id
                && event.data["status"] != "NEW";
            received.push(event);
            if last {
                return received;
            }
        }
    }
}

/// Another gateway in front of the same services.
struct Gateway {
    http: Http,
    process: Process,
}

impl Gateway {
    async fn start(shop: &Shop, more: &[(&str, &str)]) -> Self {
        let system = &shop.stack.system;
        let address = format!("127.0.0.1:{}", free_port().unwrap());
        let mut environment = vec![
            ("GOZON_LISTEN".to_owned(), address.clone()),
            ("GOZON_ORDERS_URL".to_owned(), system.address("orders")),
            ("GOZON_PAYMENTS_URL".to_owned(), system.address("payments")),
            ("NATS_URL".to_owned(), system.nats().url()),
            (
                "NATS_PASSWORD".to_owned(),
                system.folder().secrets.nats_gateway.clone(),
            ),
        ];
        environment.extend(
            more.iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned())),
        );
        let program = Program {
            environment,
            ..service_program("gateway", system.folder().log("gateway-2")).unwrap()
        };
        let process = Process::start(&program).unwrap();
        let http = Http::new(format!("http://{address}"));
        let gateway = Self { http, process };
        gateway.until_following().await;
        gateway
    }

    async fn until_following(&self) {
        until_following(&self.http).await;
    }
}

async fn until_following(http: &Http) {
    eventually("the gateway follows", SOON, async || {
        let ready = http.get("/readyz?verbose").await.ok()?;
        ready.text().contains("[+] events: ok").then_some(())
    })
    .await;
}

async fn place(http: &Http, user: &str) -> String {
    let placed = http
        .post("/v1/orders", None, &json!({ "user_id": user, "amount": 1 }))
        .await
        .unwrap();
    assert_eq!(placed.status, 201, "{}", placed.text());
    placed.json()["id"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_client_that_keeps_reconnecting_across_two_gateways_misses_no_event() {
    const ORDERS: usize = 1000;
    const CLIENTS: usize = 10;
    let shop = Shop::start().await;
    shop.customer("alice", 10_000).await;
    let second = Gateway::start(&shop, &[]).await;
    until_following(&shop.http).await;

    let ordering = join_all((0..CLIENTS).map(async |_| {
        let mut ids = Vec::new();
        for _ in 0..ORDERS / CLIENTS {
            ids.push(place(&shop.http, "alice").await);
        }
        ids
    }));
    let first = Listener::open(&shop.http, "/v1/orders/events", None).await;
    let listening = async {
        let (mut received, mut reconnects) = (Vec::new(), 0);
        let mut listener = first;
        let deadline = Instant::now() + 2 * SOON;
        while received.len() < 2 * ORDERS && Instant::now() < deadline {
            let cut = Instant::now() + Duration::from_millis(200);
            while let Ok(event) = tokio::time::timeout_at(cut, listener.next()).await {
                received.push(event.expect("only the client ends the stream"));
            }
            let door = if reconnects % 2 == 0 {
                &second.http
            } else {
                &shop.http
            };
            listener =
                Listener::open(door, "/v1/orders/events", listener.last_event_id.as_deref()).await;
            reconnects += 1;
        }
        // Wait, so that no event is still in flight.
        while let Ok(Some(event)) = timeout(Duration::from_millis(500), listener.next()).await {
            received.push(event);
        }
        (received, reconnects)
    };
    let (ids, (received, reconnects)) = tokio::join!(ordering, listening);

    assert!(reconnects > 3, "{reconnects}");
    assert_eq!(received.iter().find(|event| event.kind != "order"), None);
    let mut statuses: HashMap<String, Vec<String>> = HashMap::new();
    for event in &received {
        let (id, status) = event.order();
        statuses.entry(id).or_default().push(status);
    }
    for id in ids.into_iter().flatten() {
        assert_eq!(
            statuses.remove(&id).unwrap_or_default(),
            ["NEW", "FINISHED"],
            "{id}"
        );
    }
    assert!(statuses.is_empty());
    shop.assert_settled(ORDERS).await;
}

#[tokio::test]
async fn an_event_stream_delivers_only_what_was_subscribed() {
    let shop = Shop::start().await;
    until_following(&shop.http).await;
    shop.customer("alice", 1).await;
    let mut all = Listener::open(&shop.http, "/v1/orders/events", None).await;
    let mut of_bob = Listener::open(&shop.http, "/v1/orders/events?user_id=bob", None).await;
    let paid = place(&shop.http, "alice").await;
    let refused = place(&shop.http, "bob").await;

    let received = of_bob.until_final(&refused).await;
    let data = &received.last().unwrap().data;
    assert_eq!(
        received
            .iter()
            .map(ReceivedEvent::order)
            .collect::<Vec<_>>(),
        [
            (refused.clone(), "NEW".to_owned()),
            (refused.clone(), "CANCELLED".to_owned())
        ]
    );
    assert_eq!(
        (&data["user_id"], &data["amount"], &data["reason"]),
        (&json!("bob"), &json!(1), &json!("no_account"))
    );
    let at = OffsetDateTime::parse(data["at"].as_str().unwrap(), &Rfc3339).unwrap();
    assert!(
        (OffsetDateTime::now_utc() - at).abs() < time::Duration::minutes(2),
        "{at}"
    );
    let received = all.until_final(&paid).await;
    assert!(
        received
            .iter()
            .any(|event| event.order() == (paid.clone(), "NEW".to_owned()))
    );

    // One order: first its current status, then each change.
    let mut one = Listener::open(&shop.http, &format!("/v1/orders/{paid}/events"), None).await;
    assert_eq!(
        one.next_soon().await.order(),
        (paid.clone(), "FINISHED".to_owned())
    );
    let another = place(&shop.http, "carol").await;
    let mut one = Listener::open(&shop.http, &format!("/v1/orders/{another}/events"), None).await;
    let received = one.until_final(&another).await;
    assert_eq!(
        received.last().unwrap().order(),
        (another.clone(), "CANCELLED".to_owned())
    );
    assert!(received.iter().all(|event| event.order().0 == another));

    // A client that reconnects after a time without its own events continues after its last event,
    // also with a parameter.
    let id = of_bob.last_event_id.clone().unwrap();
    let mut resumed = Listener::open(
        &shop.http,
        &format!("/v1/orders/events?last_event_id={id}"),
        None,
    )
    .await;
    assert_eq!(
        resumed
            .until_final(&another)
            .await
            .last()
            .unwrap()
            .order()
            .0,
        another
    );

    for (path, status, code) in [
        ("/v1/orders/events?user_id=a%20b", 422, "validation_failed"),
        ("/v1/orders/events?user=alice", 422, "validation_failed"),
        (
            "/v1/orders/events?last_event_id=7",
            422,
            "validation_failed",
        ),
        ("/v1/orders/7/events", 404, "order_not_found"),
        (
            "/v1/orders/01933f3c-7d5a-7b60-9d6f-3f0b4b1f2a11/events",
            404,
            "order_not_found",
        ),
    ] {
        let answer = shop.http.get(path).await.unwrap();
        assert_eq!(
            (answer.status, answer.json()["code"].as_str()),
            (status, Some(code)),
            "{path}"
        );
    }
    // An id that no gateway has sent: the client gets a reset and must reload.
    for foreign in [
        "abc",
        "7.-",
        "99999999.01933f3c-7d5a-7b60-9d6f-3f0b4b1f2a11",
        &id.replacen('.', "0.", 1),
    ] {
        let mut lost = Listener::open(&shop.http, "/v1/orders/events", Some(foreign)).await;
        assert_eq!(lost.next_soon().await.kind, "reset", "{foreign}");
        assert_ne!(lost.last_event_id.as_deref(), Some(foreign));
    }
}

#[tokio::test]
async fn event_streams_send_a_reset_after_the_broker_lost_everything() {
    let mut shop = Shop::start().await;
    until_following(&shop.http).await;
    shop.customer("alice", 100).await;
    let mut listener = Listener::open(&shop.http, "/v1/orders/events", None).await;
    let before = place(&shop.http, "alice").await;
    listener.until_final(&before).await;
    let old_id = listener.last_event_id.clone().unwrap();

    shop.stack.system.kill("nats").await.unwrap();
    // Everything else continues, and a client that connects meanwhile waits.
    assert_eq!(
        shop.http
            .get(&format!("/v1/orders/{before}"))
            .await
            .unwrap()
            .status,
        200
    );
    let meanwhile = place(&shop.http, "alice").await;
    let mut waiting = Listener::open(&shop.http, "/v1/orders/events", Some(&old_id)).await;
    shop.stack.system.wipe_nats().unwrap();
    shop.stack.system.start("nats").await.unwrap();

    for listener in [&mut listener, &mut waiting] {
        assert_eq!(listener.next_soon().await.kind, "reset");
    }
    // After reloading: the order that was placed meanwhile exists and becomes final.
    let read = shop
        .http
        .get(&format!("/v1/orders/{meanwhile}?wait=30"))
        .await
        .unwrap()
        .json();
    assert_eq!(read["status"], "FINISHED");
    let after = place(&shop.http, "alice").await;
    let received = listener.until_final(&after).await;
    // After such a loss, events of final orders are published again; no client is told that they
    // are NEW.
    assert!(
        received.iter().all(|event| event.order().0 != before),
        "{received:?}"
    );
    let mut late = Listener::open(&shop.http, "/v1/orders/events", Some(&old_id)).await;
    assert_eq!(late.next_soon().await.kind, "reset");
    shop.assert_settled(3).await;
}

#[tokio::test]
async fn replayed_events_change_no_status() {
    let mut shop = Shop::start().await;
    until_following(&shop.http).await;
    shop.customer("alice", 100).await;
    let mut listener = Listener::open(&shop.http, "/v1/orders/events", None).await;
    let beginning = {
        let first = place(&shop.http, "alice").await;
        listener.until_final(&first).await;
        listener.last_event_id.clone().unwrap()
    };
    let mut ids = Vec::new();
    for _ in 0..5 {
        let id = place(&shop.http, "alice").await;
        listener.until_final(&id).await;
        ids.push(id);
    }
    let operator = shop.operator().await;
    shop.replay_stream(&operator, "ORDERS", 12).await;
    // A gateway that is started later behaves in the same way.
    shop.stack.system.kill("gateway").await.unwrap();
    shop.stack.system.start("gateway").await.unwrap();
    until_following(&shop.http).await;
    shop.replay_stream(&operator, "ORDERS", 24).await;
    let last = place(&shop.http, "alice").await;

    let mut again = Listener::open(&shop.http, "/v1/orders/events", Some(&beginning)).await;
    let received: Vec<_> = again
        .until_final(&last)
        .await
        .iter()
        .map(ReceivedEvent::order)
        .collect();
    let expected: Vec<_> = ids
        .iter()
        .chain([&last])
        .flat_map(|id| ["NEW", "FINISHED"].map(|status| (id.clone(), status.to_owned())))
        .collect();
    assert_eq!(received, expected);
}

#[tokio::test]
async fn a_slow_event_client_is_disconnected_and_delays_no_other() {
    const BATCHES: usize = 40;
    const IN_BATCH: usize = 1000;
    let shop = Shop::start().await;
    let gateway = Gateway::start(&shop, &[("GOZON_EVENT_STREAMS_MAX", "2")]).await;
    // It sends the request and reads nothing.
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let address = gateway
        .http
        .base()
        .strip_prefix("http://")
        .unwrap()
        .parse()
        .unwrap();
    let mut slow = socket.connect(address).await.unwrap();
    slow.write_all(b"GET /v1/orders/events HTTP/1.1\r\nhost: gateway\r\n\r\n")
        .await
        .unwrap();
    slow.readable().await.unwrap();
    let mut good = Listener::open(&gateway.http, "/v1/orders/events", None).await;
    let refused = gateway.http.get("/v1/orders/events").await.unwrap();
    assert_eq!(
        (refused.status, &refused.json()["code"]),
        (503, &json!("overloaded"))
    );

    // More than all buffers in between can hold. Only gateways read these events.
    let operator = shop.operator().await;
    let publishing = async {
        for batch in 0..BATCHES {
            let batch_id = format!("batch-{batch}");
            for number in 1..=IN_BATCH {
                let order_id = Uuid::now_v7();
                let mut headers = HeaderMap::new();
                headers.insert(header::ID, Uuid::now_v7().to_string());
                headers.insert(header::TYPE, OrderFinished::TYPE);
                headers.insert(
                    header::TIME,
                    OffsetDateTime::now_utc().format(&Rfc3339).unwrap(),
                );
                headers.insert("Nats-Batch-Id", batch_id.as_str());
                headers.insert("Nats-Batch-Sequence", number.to_string());
                let body: bytes::Bytes =
                    json!({ "order_id": order_id, "user_id": "alice", "amount": 1 })
                        .to_string()
                        .into();
                if number < IN_BATCH {
                    operator
                        .client()
                        .publish_with_headers(OrderFinished::SUBJECT, headers, body)
                        .await
                        .unwrap();
                } else {
                    headers.insert("Nats-Batch-Commit", "1");
                    operator
                        .jetstream()
                        .publish_with_headers(OrderFinished::SUBJECT, headers, body)
                        .await
                        .unwrap()
                        .await
                        .unwrap();
                }
            }
        }
    };
    let listening = async {
        let mut received = 0;
        while received < BATCHES * IN_BATCH {
            assert_eq!(good.next_soon().await.kind, "order");
            received += 1;
        }
    };
    tokio::join!(publishing, listening);
    // The slow client no longer counts towards the limit.
    eventually("the slow client is disconnected", SOON, async || {
        gateway
            .http
            .open("/v1/orders/events", &[])
            .await
            .ok()
            .filter(|stream| stream.status == 200)
    })
    .await;
    drop(slow);
}

#[tokio::test]
async fn event_streams_end_when_the_gateway_stops() {
    let shop = Shop::start().await;
    let gateway = Gateway::start(&shop, &[]).await;
    let mut listener = Listener::open(&gateway.http, "/v1/orders/events", None).await;
    let begun = Instant::now();
    let (ended, stopped) = tokio::join!(timeout(SOON, listener.next()), gateway.process.stop());
    assert_eq!(ended.unwrap(), None);
    stopped.unwrap();
    assert!(
        begun.elapsed() < Duration::from_secs(10),
        "{:?}",
        begun.elapsed()
    );
}
