//! Three brokers that are one, killed one after the other and all at once.

use stack::ports::free_port;
use stack::testing::{TestCluster, TestStack, eventually};

use crate::faults::{CLIENTS, ORDERS_EACH, shop_while, with_customers};
use crate::shop::{SOON, Shop};

async fn shop_with_a_cluster() -> (Shop, TestCluster) {
    let ports = [free_port().unwrap(), free_port().unwrap(), free_port().unwrap()];
    let urls = ports.map(|port| format!("nats://127.0.0.1:{port}")).join(",");
    let environment = [("NATS_URL", urls.as_str()), ("GOZON_STREAM_REPLICAS", "3")];
    let environment = environment.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
    let mut stack = TestStack::prepare(environment).await.unwrap();
    let mut cluster = TestCluster::prepare(&stack.system.place().secrets, ports).unwrap();
    for number in 0..3 {
        cluster.spawn(number).unwrap();
    }
    cluster.until_ready().await.unwrap();
    for name in ["postgres", "orders", "payments", "gateway"] {
        stack.system.start(name).await.unwrap();
    }
    (with_customers(Shop::on(stack)).await, cluster)
}

#[tokio::test]
async fn f28_a_cluster_loses_its_leader_then_two_then_all_three() {
    let (mut shop, mut cluster) = shop_with_a_cluster().await;
    let mut orders = 0;
    for killed in 1..=3 {
        shop_while(&mut shop, async |_| {
            let leader = eventually("a server leads", SOON, async || cluster.leader("ORDERS").await).await;
            let numbers: Vec<usize> = (0..killed).map(|next| (leader + next) % 3).collect();
            for number in &numbers {
                cluster.kill(*number).await.unwrap();
            }
            if killed == 1 {
                // Two of three go on by themselves.
                eventually("another server leads", SOON, async || cluster.leader("ORDERS").await).await;
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

/// The leader is cut off (frozen), another one takes over and is killed, and the first comes back with what it knew: the
/// schedule under which a cluster has been seen to lose what it had acknowledged.
#[tokio::test]
async fn f29_a_leader_is_cut_off_and_comes_back_when_the_next_is_killed() {
    let (mut shop, mut cluster) = shop_with_a_cluster().await;
    for round in 1..=2 {
        shop_while(&mut shop, async |_| {
            let first = eventually("a server leads", SOON, async || cluster.leader("ORDERS").await).await;
            cluster.pause(first).unwrap();
            let others = [(first + 1) % 3, (first + 2) % 3];
            let next = eventually("another server leads", SOON, async || cluster.leader_among("ORDERS", &others).await).await;
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
