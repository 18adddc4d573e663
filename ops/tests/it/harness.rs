//! A running system with one customer, and an operator's access to its databases and broker.

use std::time::Duration;

use broker::{Broker, BrokerConfig};
use messaging::ReplayOutcome;
use ops::audit::{Databases, FindingKind, Options, audit};
use ops::dead_letters::{self, ServiceDeadLetter};
use serde_json::{Value, json};
use stack::http::Http;
use stack::testing::{TestStack, eventually};

pub(crate) const SOON: Duration = Duration::from_secs(30);
pub(crate) const WITHOUT_GRACE: Options = Options {
    grace: Duration::ZERO,
    stuck_after: Duration::from_secs(3600),
    late_after: Duration::from_secs(3600),
};

pub(crate) struct TestShop {
    pub(crate) stack: TestStack,
    pub(crate) http: Http,
    pub(crate) databases: Databases,
    pub(crate) broker: Broker,
}

/// Connects to the broker as user `ops`.
pub(crate) async fn operator(stack: &TestStack) -> Broker {
    let password = stack.system.folder().secrets.nats_ops.clone();
    let config = BrokerConfig {
        url: stack.system.nats().url(),
        user: "ops".to_owned(),
        password: password.into(),
        name: "test".to_owned(),
    };
    let broker = Broker::connect(config).await.unwrap();
    broker.until_connected().await;
    broker
}

impl TestShop {
    pub(crate) async fn start() -> Self {
        let stack = TestStack::start().await.unwrap();
        let connect = async |name: &str| stack.system.postgres().connect(name).await.unwrap();
        let databases = Databases {
            orders: connect("orders").await,
            payments: connect("payments").await,
        };
        let broker = operator(&stack).await;
        let http = Http::new(stack.system.address("gateway"));
        assert_eq!(
            http.post("/v1/accounts", None, &json!({ "user_id": "alice" }))
                .await
                .unwrap()
                .status,
            201
        );
        assert_eq!(
            http.post(
                "/v1/accounts/alice/deposits",
                None,
                &json!({ "amount": 100 })
            )
            .await
            .unwrap()
            .status,
            201
        );
        Self {
            stack,
            http,
            databases,
            broker,
        }
    }

    pub(crate) async fn place(&self) -> String {
        let placed = self
            .http
            .post(
                "/v1/orders",
                None,
                &json!({ "user_id": "alice", "amount": 30 }),
            )
            .await
            .unwrap();
        placed.json()["id"].as_str().unwrap().to_owned()
    }

    pub(crate) async fn order(&self, id: &str) -> Value {
        self.http
            .get(&format!("/v1/orders/{id}"))
            .await
            .unwrap()
            .json()
    }

    pub(crate) async fn balance(&self) -> Value {
        self.http.get("/v1/accounts/alice").await.unwrap().json()["balance"].clone()
    }

    pub(crate) async fn letter(
        &self,
        wanted: impl Fn(&ServiceDeadLetter) -> bool,
    ) -> ServiceDeadLetter {
        eventually("the dead letter is as expected", SOON, async || {
            dead_letters::list(&self.databases)
                .await
                .unwrap()
                .into_iter()
                .find(|letter| wanted(letter))
        })
        .await
    }

    pub(crate) async fn replay(&self, letter: &ServiceDeadLetter) {
        dead_letters::replay(&self.databases, letter, false)
            .await
            .unwrap();
    }

    pub(crate) async fn dry_run(&self, letter: &ServiceDeadLetter) -> (ReplayOutcome, String) {
        let replay = dead_letters::replay(&self.databases, letter, true)
            .await
            .unwrap();
        assert!(replay.dry_run);
        (replay.outcome, replay.detail)
    }

    pub(crate) async fn findings(&self) -> Vec<FindingKind> {
        audit(&self.databases, WITHOUT_GRACE)
            .await
            .unwrap()
            .findings
            .into_iter()
            .map(|finding| finding.kind)
            .collect()
    }
}
