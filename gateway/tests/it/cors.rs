//! CORS: requests from pages of other origins.

use bytes::Bytes;
use stack::http::Answer;

use crate::harness::{Gateway, Reaction, ok};

const SHOP: &str = "https://shop.example";

async fn preflight(gateway: &Gateway, origin: &str) -> Answer {
    let headers = [
        ("origin", origin),
        ("access-control-request-method", "POST"),
        (
            "access-control-request-headers",
            "content-type,idempotency-key",
        ),
    ];
    gateway
        .http
        .request("OPTIONS", "/v1/orders", &headers, Bytes::new())
        .await
        .unwrap()
}

async fn get(gateway: &Gateway, path: &str, origin: &str) -> Answer {
    gateway
        .http
        .request("GET", path, &[("origin", origin)], Bytes::new())
        .await
        .unwrap()
}

#[tokio::test]
async fn other_origins_are_rejected_unless_they_are_listed() {
    let gateway = Gateway::start(|_| Reaction::Answers(ok("{}"))).await;
    assert_eq!(
        preflight(&gateway, SHOP)
            .await
            .header("access-control-allow-origin"),
        None
    );
    assert_eq!(
        get(&gateway, "/v1/orders", SHOP)
            .await
            .header("access-control-allow-origin"),
        None
    );
}

#[tokio::test]
async fn only_a_listed_origin_may_use_the_api_and_read_its_errors() {
    let list = format!("--cors-origins={SHOP},http://localhost:3000");
    let gateway = Gateway::start_with(&[&list], |_| Reaction::Answers(ok("{}"))).await;
    let allowed = preflight(&gateway, SHOP).await;
    assert_eq!(
        (
            allowed.status,
            allowed.header("access-control-allow-origin")
        ),
        (200, Some(SHOP))
    );
    assert_eq!(
        allowed.header("access-control-allow-methods"),
        Some("GET,POST")
    );
    assert!(
        allowed
            .header("access-control-allow-headers")
            .unwrap()
            .contains("idempotency-key")
    );
    assert_eq!(allowed.header("access-control-allow-credentials"), None);
    for path in ["/v1/orders", "/nowhere"] {
        let answer = get(&gateway, path, "http://localhost:3000").await;
        assert_eq!(
            answer.header("access-control-allow-origin"),
            Some("http://localhost:3000"),
            "{path}"
        );
        assert!(
            answer
                .header("access-control-expose-headers")
                .unwrap()
                .contains("idempotency-replayed"),
            "{path}"
        );
        assert!(answer.header("vary").unwrap().contains("origin"), "{path}");
    }
    for stranger in [
        "https://shop.example.evil.example",
        "http://shop.example",
        "https://SHOP.example",
        "null",
    ] {
        assert_eq!(
            preflight(&gateway, stranger)
                .await
                .header("access-control-allow-origin"),
            None,
            "{stranger}"
        );
        assert_eq!(
            get(&gateway, "/v1/orders", stranger)
                .await
                .header("access-control-allow-origin"),
            None,
            "{stranger}"
        );
    }
}
