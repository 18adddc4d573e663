//! One service, one address or one slow client cannot take the slots of the others.
//!
//! The short form runs with small limits. `GOZON_LONG=1` runs the full form with the default
//! limits.

use std::net::SocketAddr;
use std::sync::Arc;

use futures_util::future::join_all;
use stack::testing::eventually;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use crate::harness::{Gateway, Reaction, ReceivedRequest, SOON, ok};

/// The addresses of two clients.
const GREEDY: &str = "127.0.0.2";
const OTHER: &str = "127.0.0.1";

const BALANCE: &str = "GET /v1/accounts/alice HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
const LIST: &str = "GET /v1/orders HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
const ORDER: &str = "POST /v1/orders HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n\
                     Connection: close\r\nContent-Length: 2\r\n\r\n{}";
const DEPOSIT: &str = "POST /v1/accounts/alice/deposits HTTP/1.1\r\nHost: x\r\n\
                       Content-Type: application/json\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}";

const WAIT_7: &str = "GET /v1/orders/7?wait=30 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
const WAIT_8: &str = "GET /v1/orders/8?wait=30 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";

/// The size of a test, in its short or full form.
struct Scale {
    arguments: &'static [&'static str],
    /// Number of requests that try to take slots.
    greedy: usize,
    /// Number of requests that must be answered meanwhile.
    others: usize,
}

fn scale(arguments: &'static [&'static str], short: (usize, usize), full: (usize, usize)) -> Scale {
    let long = std::env::var_os("GOZON_LONG").is_some();
    let (greedy, others) = if long { full } else { short };
    Scale {
        arguments: if long { &[] } else { arguments },
        greedy,
        others,
    }
}

async fn connect(source: &str, to: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket
        .bind(SocketAddr::new(source.parse().unwrap(), 0))
        .unwrap();
    socket.connect(to).await.unwrap()
}

async fn send(source: &str, gateway: &Gateway, request: &str) -> TcpStream {
    let mut stream = connect(source, gateway.address).await;
    stream.write_all(request.as_bytes()).await.unwrap();
    stream
}

/// The status of the next response.
async fn status(stream: &mut TcpStream) -> u16 {
    let mut line = [0; 12];
    timeout(SOON, stream.read_exact(&mut line))
        .await
        .unwrap()
        .unwrap();
    std::str::from_utf8(&line[9..]).unwrap().parse().unwrap()
}

async fn ask(source: &str, gateway: &Gateway, request: &str) -> u16 {
    status(&mut send(source, gateway, request).await).await
}

/// Asserts that each of these requests, sent one after the other, is answered with 200.
async fn all_pass(count: usize, source: &str, gateway: &Gateway, request: &str) {
    let mut passed = 0;
    for _ in 0..count {
        passed += usize::from(ask(source, gateway, request).await == 200);
    }
    assert_eq!(passed, count, "from {source}: {}", &request[..30]);
}

/// Requests for `hanging` are never answered.
async fn with_a_service_that_hangs(arguments: &[&str], hanging: &'static str) -> Gateway {
    let never = Arc::default();
    Gateway::start_with(arguments, move |request: &ReceivedRequest| {
        if request.line.contains(hanging) {
            Reaction::AnswersWhen(Arc::clone(&never))
        } else {
            Reaction::Answers(ok("{}"))
        }
    })
    .await
}

#[tokio::test]
async fn a_service_that_hangs_takes_no_slot_of_the_other() {
    let scale = scale(&["--requests-max=8"], (24, 20), (700, 200));
    for (hanging, hangs, works) in [("/accounts", BALANCE, ORDER), ("/orders", LIST, DEPOSIT)] {
        let gateway = with_a_service_that_hangs(scale.arguments, hanging).await;
        let held = join_all((0..scale.greedy).map(|_| send(OTHER, &gateway, hangs))).await;
        eventually("all slots are taken", SOON, async || {
            (ask(OTHER, &gateway, hangs).await == 503).then_some(())
        })
        .await;
        all_pass(scale.others, OTHER, &gateway, works).await;
        drop(held);
    }
}

#[tokio::test]
async fn a_request_takes_no_slot_before_its_body_is_complete() {
    let scale = scale(&["--requests-max=8"], (12, 20), (600, 200));
    let gateway = Gateway::start_with(scale.arguments, |_| Reaction::Answers(ok("{}"))).await;
    let head = ORDER.replace("\r\n\r\n{}", "\r\nExpect: 100-continue\r\n\r\n");
    let mut slow = join_all((0..scale.greedy).map(|_| send(GREEDY, &gateway, &head))).await;
    for stream in &mut slow {
        assert_eq!(status(stream).await, 100, "the gateway reads the body");
    }
    for source in [OTHER, GREEDY] {
        all_pass(scale.others, source, &gateway, ORDER).await;
    }
    drop(slow);
}

#[tokio::test]
async fn one_address_leaves_a_quarter_of_the_slots_to_others() {
    for (hanging, request, other) in [
        ("GET /v1/accounts/alice", BALANCE, DEPOSIT),
        ("GET /v1/orders", LIST, ORDER),
        ("GET /v1/orders/7", WAIT_7, WAIT_8),
    ] {
        let scale = scale(
            &["--requests-max=8", "--waits-max=8"],
            (12, 20),
            (1000, 200),
        );
        let gateway = with_a_service_that_hangs(scale.arguments, hanging).await;
        let before = gateway.rejected_count("client_share").await;
        let held = join_all((0..scale.greedy).map(|_| send(GREEDY, &gateway, request))).await;
        eventually("the address holds its share", SOON, async || {
            (ask(GREEDY, &gateway, request).await == 503).then_some(())
        })
        .await;
        all_pass(scale.others, OTHER, &gateway, other).await;
        assert!(gateway.rejected_count("client_share").await > before);
        drop(held);
    }
}

#[tokio::test]
async fn one_address_leaves_a_quarter_of_the_event_streams_to_others() {
    let nats = format!(
        "--nats-url=nats://127.0.0.1:{}",
        stack::ports::free_port().unwrap()
    );
    let gateway = Gateway::start_with(
        &["--nats-password=x", &nats, "--event-streams-max=8"],
        |_| Reaction::Answers(ok("{}")),
    )
    .await;
    let follow = "GET /v1/orders/events HTTP/1.1\r\nHost: x\r\n\r\n";
    let mut open = Vec::new();
    for (source, expected) in [
        (GREEDY, [200; 6].as_slice()),
        (GREEDY, &[503; 3]),
        (OTHER, &[200; 2]),
        (OTHER, &[503]),
    ] {
        for expected in expected {
            let mut stream = send(source, &gateway, follow).await;
            assert_eq!(
                status(&mut stream).await,
                *expected,
                "from {source}, {} open",
                open.len()
            );
            open.push(stream);
        }
    }
}

#[tokio::test]
async fn one_address_leaves_a_quarter_of_the_connections_to_others() {
    let scale = scale(&["--connections-max=64"], (70, 12), (4200, 200));
    let gateway = Gateway::start_with(scale.arguments, |_| Reaction::Answers(ok("{}"))).await;
    // These clients do not read the responses.
    let unread = "GET /v1/orders HTTP/1.1\r\nHost: x\r\n\r\n";
    let open = join_all((0..scale.greedy).map(|_| send(GREEDY, &gateway, unread))).await;
    for probe in ["livez", "readyz"] {
        let probe = format!("GET /{probe} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        for source in [OTHER, GREEDY] {
            assert_eq!(
                ask(source, &gateway, &probe).await,
                200,
                "{probe} from {source}"
            );
        }
    }
    all_pass(scale.others, OTHER, &gateway, ORDER).await;
    drop(open);
}
