//! Three brokers that are one, killed one after the other and all at once.

use stack::ports::free_port;
use stack::testing::{TestCluster, TestStack, eventually};

use crate::faults::{CLIENTS, ORDERS_EACH, shop_while, with_customers};
use crate::shop::{SOON, Shop};

#[tokio::test]
async fn f28_a_cluster_loses_its_leader_then_two_then_all_three() {
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
    let mut shop = with_customers(Shop::on(stack)).await;

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
