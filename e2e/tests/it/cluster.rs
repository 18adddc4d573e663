//! A cluster of three brokers, killed one after the other and all at once.

use async_nats::jetstream::message::PublishMessage;
use broker::{Broker, BrokerConfig};
use futures_util::StreamExt as _;
use stack::ports::free_port;
use stack::testing::{TestCluster, TestStack, eventually};

use crate::faults::{CLIENTS, ORDERS_EACH, place_orders_while, with_customers};
use crate::shop::{SOON, Shop};

async fn shop_with_a_cluster() -> (Shop, TestCluster) {
    let ports = [
        free_port().unwrap(),
        free_port().unwrap(),
        free_port().unwrap(),
    ];
    let urls = ports
        .map(|port| format!("nats://127.0.0.1:{port}"))
        .join(",");
    let environment = [("NATS_URL", urls.as_str()), ("GOZON_STREAM_REPLICAS", "3")];
    let environment = environment
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec();
    let mut stack = TestStack::prepare(environment).await.unwrap();
    let mut cluster = TestCluster::prepare(&stack.system.folder().secrets, ports).unwrap();
    for number in 0..3 {
        cluster.spawn(number).unwrap();
    }
    cluster.until_ready().await.unwrap();
    for name in ["postgres", "orders", "payments", "gateway"] {
        stack.system.start(name).await.unwrap();
    }
    (with_customers(Shop::with_stack(stack)).await, cluster)
}

#[tokio::test]
async fn f28_a_broker_cluster_loses_its_leader_then_two_then_all_three_servers() {
    let (mut shop, mut cluster) = shop_with_a_cluster().await;
    let mut orders = 0;
    for killed in 1..=3 {
        place_orders_while(&mut shop, async |_| {
            let leader = eventually("a server leads", SOON, async || {
                cluster.leader("ORDERS").await
            })
            .await;
            let numbers: Vec<usize> = (0..killed).map(|next| (leader + next) % 3).collect();
            for number in &numbers {
                cluster.kill(*number).await.unwrap();
            }
            if killed == 1 {
                // Two of three servers continue without intervention.
                eventually("another server leads", SOON, async || {
                    cluster.leader("ORDERS").await
                })
                .await;
            }
            for number in numbers {
                cluster.spawn(number).unwrap();
            }
            cluster.until_ready().await.unwrap();
        })
        .await;
        orders += CLIENTS * ORDERS_EACH;
        shop.assert_settled(orders).await;
    }
    assert_eq!(shop.assert_settled(orders).await, 100);
}

/// The leader is frozen, another server takes over and is killed, and the first one resumes with
/// its old state. In this schedule, clusters have been observed to lose acknowledged messages.
#[tokio::test]
async fn f29_a_frozen_cluster_leader_returns_while_its_successor_is_killed() {
    let (mut shop, mut cluster) = shop_with_a_cluster().await;
    for round in 1..=2 {
        place_orders_while(&mut shop, async |_| {
            let first = eventually("a server leads", SOON, async || {
                cluster.leader("ORDERS").await
            })
            .await;
            cluster.pause(first).unwrap();
            let others = [(first + 1) % 3, (first + 2) % 3];
            let next = eventually("another server leads", SOON, async || {
                cluster.leader_among("ORDERS", &others).await
            })
            .await;
            cluster.kill(next).await.unwrap();
            cluster.resume(first).unwrap();
            cluster.spawn(next).unwrap();
            cluster.until_ready().await.unwrap();
        })
        .await;
        shop.assert_settled(round * CLIENTS * ORDERS_EACH).await;
    }
    assert_eq!(shop.assert_settled(2 * CLIENTS * ORDERS_EACH).await, 100);
}

/// Two clients send the same message at once, as a relay does whose PubAck is late. While the first
/// is being stored, the leader rejects the second as "in process"; a single server never does. A
/// relay treats that as a failure, sends the row again, and then it is a duplicate. It is stored
/// once.
#[tokio::test]
async fn f18_a_duplicate_sent_while_the_first_is_being_stored_is_stored_once() {
    const IN_PROCESS: u64 = 10158;
    const TRIES: u64 = 500;
    let (shop, cluster) = shop_with_a_cluster().await;
    let leader = eventually("a server leads", SOON, async || {
        cluster.leader("ORDERS").await
    })
    .await;
    let password = shop.stack.system.folder().secrets.nats_ops.clone();
    let config = BrokerConfig {
        url: cluster.url(leader),
        user: "ops".to_owned(),
        password: password.into(),
        name: "test".to_owned(),
    };
    let ops = Broker::connect(config).await.unwrap();
    ops.until_connected().await;
    let send = async |id: &str| {
        let message = PublishMessage::build().message_id(id).payload("{}".into());
        // No consumer reads this subject.
        ops.jetstream()
            .send_publish("gozon.orders.probe", message)
            .await
            .unwrap()
    };
    let (mut stored, mut in_process) = (0, false);
    while !in_process {
        assert!(
            stored < TRIES,
            "{stored} pairs were sent, but no second message arrived while the first was being stored"
        );
        let id = format!("probe-{stored}");
        let (one, other) = (send(&id).await, send(&id).await);
        let (one, other) = (one.await, other.await);
        assert!(!one.unwrap().duplicate);
        stored += 1;
        in_process = match other {
            Ok(ack) if ack.duplicate => false,
            Ok(ack) => panic!("stored twice: {ack:?}"),
            Err(error) => {
                let words = format!("{:?} {:?}", error, std::error::Error::source(&error));
                assert!(words.contains(&IN_PROCESS.to_string()), "{words}");
                // Sent again, it is a duplicate.
                assert!(send(&id).await.await.unwrap().duplicate);
                true
            }
        };
    }
    let stream = ops.jetstream().get_stream("ORDERS").await.unwrap();
    let messages = stream
        .info_with_subjects("gozon.orders.probe")
        .await
        .unwrap();
    assert_eq!(messages.info.state.subjects_count, 1);
    let number: usize = messages
        .map(|one| one.unwrap().1)
        .collect::<Vec<_>>()
        .await
        .into_iter()
        .sum();
    assert_eq!(number as u64, stored);
}
