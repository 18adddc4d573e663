//! The metrics at `GET /metrics`.

use serde_json::json;
use stack::http::Http;
use stack::testing::eventually;

use crate::shop::{SOON, Shop};

struct Page(String);

impl Page {
    async fn of(shop: &Shop, service: &str) -> Self {
        let answer = Http::new(shop.stack.system.address(service))
            .get("/metrics")
            .await
            .unwrap();
        assert_eq!(answer.status, 200);
        assert!(
            answer
                .header("content-type")
                .unwrap()
                .starts_with("text/plain; version=0.0.4")
        );
        Self(answer.text())
    }

    /// The value of the line with this prefix.
    fn value(&self, series: &str) -> Option<f64> {
        self.0
            .lines()
            .find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
    }
}

#[tokio::test]
async fn every_service_exports_its_metrics() {
    let shop = Shop::start().await;
    shop.customer("alice", 100).await;
    assert_eq!(shop.order("alice", 60).await.0, "FINISHED");
    assert_eq!(shop.order("alice", 60).await.0, "CANCELLED");
    assert_eq!(shop.order("nobody", 1).await.0, "CANCELLED");
    let repeated = json!({ "user_id": "alice", "amount": 1 });
    for _ in 0..2 {
        assert_eq!(
            shop.http
                .post("/v1/orders", Some("twice"), &repeated)
                .await
                .unwrap()
                .status,
            201
        );
    }
    let orders = eventually("the last order is final", SOON, async || {
        let page = Page::of(&shop, "orders").await;
        let is_final = page.value("gozon_orders_ended_total{outcome=\"paid\"}") == Some(2.0)
            // Gauges are read before the counters.
            && page.value("gozon_oldest_new_order_age_seconds") == Some(0.0);
        is_final.then_some(page)
    })
    .await;
    let payments = eventually("the last answer is published", SOON, async || {
        let page = Page::of(&shop, "payments").await;
        (page.value("gozon_published_total{result=\"acknowledged\"}") == Some(4.0)).then_some(page)
    })
    .await;
    let gateway = Page::of(&shop, "gateway").await;
    let placed = "{method=\"POST\",route=\"/v1/orders\",status=\"201\"}";
    for (page, series, value) in [
        (&orders, "gozon_orders_placed_total{result=\"stored\"}", 4.0),
        (
            &orders,
            "gozon_orders_placed_total{result=\"repeated\"}",
            1.0,
        ),
        (
            &orders,
            "gozon_orders_ended_total{outcome=\"insufficient_funds\"}",
            1.0,
        ),
        (
            &orders,
            "gozon_orders_ended_total{outcome=\"no_account\"}",
            1.0,
        ),
        (
            &orders,
            "gozon_order_placed_to_final_duration_seconds_count",
            4.0,
        ),
        (
            &orders,
            "gozon_messages_total{consumer=\"orders-payment-settled\",result=\"first\"}",
            4.0,
        ),
        (&orders, "gozon_orders_asked_again_total", 0.0),
        (&orders, "gozon_oldest_new_order_age_seconds", 0.0),
        (&payments, "gozon_decisions_total{outcome=\"paid\"}", 2.0),
        (
            &payments,
            "gozon_decisions_total{outcome=\"insufficient_funds\"}",
            1.0,
        ),
        (
            &payments,
            "gozon_decisions_total{outcome=\"no_account\"}",
            1.0,
        ),
        (
            &payments,
            "gozon_messages_total{consumer=\"payments-order-placed\",result=\"first\"}",
            4.0,
        ),
        (&payments, "gozon_outbox_pending", 0.0),
        (&payments, "gozon_dead_letters{kind=\"poison\"}", 0.0),
        (&gateway, &format!("gozon_http_requests_total{placed}"), 5.0),
    ] {
        assert_eq!(page.value(series), Some(value), "{series} in\n{}", page.0);
    }
    for (service, series, value) in [
        (
            "orders",
            "gozon_consumer_pending{consumer=\"payments-order-placed\"}",
            0.0,
        ),
        ("orders", "gozon_stream_messages{stream=\"ORDERS\"}", 8.0),
        (
            "orders",
            "gozon_stream_max_bytes{stream=\"ORDERS\"}",
            f64::from(1 << 30),
        ),
        (
            "payments",
            "gozon_consumer_pending{consumer=\"orders-payment-settled\"}",
            0.0,
        ),
        (
            "payments",
            "gozon_stream_messages{stream=\"PAYMENTS\"}",
            4.0,
        ),
    ] {
        // The broker may answer too late for one scrape.
        let shown =
            async || (Page::of(&shop, service).await.value(series) == Some(value)).then_some(());
        eventually(series, SOON, shown).await;
    }
    for series in [
        "gozon_publish_duration_seconds_sum",
        "gozon_transaction_duration_seconds_sum{work=\"place\"}",
    ] {
        assert!(
            orders.value(series).is_some_and(|seconds| seconds > 0.0),
            "{series} in\n{}",
            orders.0
        );
    }
}

#[tokio::test]
async fn client_input_creates_no_new_metric_series() {
    let shop = Shop::start().await;
    let send = async |round: &str| {
        for number in 0..20 {
            let path = format!("/v1/orders/{round}-{number}");
            shop.http
                .request("GET", &path, &[], bytes::Bytes::new())
                .await
                .unwrap();
            shop.http
                .request(
                    &format!("M{round}{number}"),
                    &path,
                    &[],
                    bytes::Bytes::new(),
                )
                .await
                .unwrap();
            shop.http
                .get(&format!("/nowhere/{round}/{number}"))
                .await
                .unwrap();
            shop.http
                .get(&format!("/v1/accounts/{round}{number}"))
                .await
                .unwrap();
        }
    };
    send("a").await;
    let series = async || Page::of(&shop, "gateway").await.0.lines().count();
    let before = series().await;
    send("b").await;
    assert_eq!(series().await, before);
}

#[tokio::test]
async fn backlog_metrics_show_age_and_are_absent_while_the_database_is_down() {
    let mut shop = Shop::start().await;
    shop.stack.system.kill("nats").await.unwrap();
    let body = json!({ "user_id": "alice", "amount": 1 });
    assert_eq!(
        shop.http
            .post("/v1/orders", Some("waits"), &body)
            .await
            .unwrap()
            .status,
        201
    );
    eventually("the age of the backlog grows", SOON, async || {
        let page = Page::of(&shop, "orders").await;
        let age = |name| page.value(name).is_some_and(|seconds| seconds > 0.1);
        (page.value("gozon_outbox_pending") == Some(1.0)
            && age("gozon_outbox_oldest_pending_age_seconds")
            && age("gozon_oldest_new_order_age_seconds"))
        .then_some(())
    })
    .await;
    shop.stack.system.kill("postgres").await.unwrap();
    let page = Page::of(&shop, "orders").await;
    assert_eq!(
        page.value("gozon_outbox_pending"),
        None,
        "an old value is not exported as current"
    );
    assert_eq!(
        page.value("gozon_orders_placed_total{result=\"stored\"}"),
        Some(1.0)
    );
}
