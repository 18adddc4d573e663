//! The cost of an order in statements, messages and bytes. Detects performance regressions
//! independently of the machine's load.

use std::time::Instant;

use futures_util::future::join_all;
use sea_orm::{ConnectionTrait as _, DatabaseConnection, DbBackend, Statement};
use stack::Proxies;
use stack::proxy::Traffic;
use stack::seed::Seed;
use stack::testing::{TestStack, eventually, own_programs};

use crate::shop::{SOON, Shop};

const ORDERS: u64 = 30;

/// Counters since the start.
#[derive(Clone, Copy, Debug)]
struct Counters {
    traffic: Traffic,
    wal_bytes: u64,
    stream_bytes: u64,
    stream_messages: u64,
}

/// Counters per order.
#[derive(Clone, Copy, Debug)]
struct Cost {
    seconds: f64,
    statements: f64,
    round_trips: f64,
    messages: f64,
    message_bytes: f64,
    wal_bytes: f64,
    stream_bytes: f64,
    stream_messages: f64,
}

struct Meters {
    shop: Shop,
    proxies: Proxies,
    databases: [DatabaseConnection; 2],
}

impl Meters {
    async fn start() -> Self {
        let mut seed = Seed::new(1);
        let (stack, proxies) =
            TestStack::start_behind_proxies(&own_programs().unwrap(), Vec::new(), &mut seed)
                .await
                .unwrap();
        let postgres = stack.system.postgres();
        let databases = [
            postgres.connect("orders").await.unwrap(),
            postgres.connect("payments").await.unwrap(),
        ];
        Self {
            shop: Shop::with_stack(stack),
            proxies,
            databases,
        }
    }

    /// Waits until nothing is in progress, and reads the counters.
    async fn read(&self) -> Counters {
        for db in &self.databases {
            let all_published = async || {
                let query = "SELECT NOT EXISTS (SELECT 1 FROM outbox WHERE published_at IS NULL)";
                text(db, query).await.parse::<bool>().unwrap().then_some(())
            };
            eventually("all outboxes are empty", SOON, all_published).await;
        }
        let mut traffic = Traffic::default();
        for service in ["orders", "payments"] {
            let [database, broker] =
                ["postgres", "nats"].map(|part| self.proxies.between(service, part).traffic());
            traffic.statements += database.statements;
            traffic.round_trips += database.round_trips;
            traffic.messages += broker.messages;
            traffic.message_bytes += broker.message_bytes;
        }
        let monitor = stack::http::Http::new(format!(
            "http://127.0.0.1:{}",
            self.shop.stack.system.ports().nats_monitor
        ));
        let jetstream = monitor.get("/jsz").await.unwrap().json();
        let wal_bytes = text(
            &self.databases[0],
            "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint",
        )
        .await;
        Counters {
            traffic,
            wal_bytes: wal_bytes.parse().unwrap(),
            stream_bytes: jetstream["bytes"].as_u64().unwrap(),
            stream_messages: jetstream["messages"].as_u64().unwrap(),
        }
    }

    async fn cost_of(&self, orders: impl AsyncFnOnce(&Shop)) -> Cost {
        let before = self.read().await;
        let begun = Instant::now();
        orders(&self.shop).await;
        let after = self.read().await;
        let each =
            |pick: fn(&Counters) -> u64| (pick(&after) - pick(&before)) as f64 / ORDERS as f64;
        let cost = Cost {
            seconds: begun.elapsed().as_secs_f64() / ORDERS as f64,
            statements: each(|counted| counted.traffic.statements),
            round_trips: each(|counted| counted.traffic.round_trips),
            messages: each(|counted| counted.traffic.messages),
            message_bytes: each(|counted| counted.traffic.message_bytes),
            wal_bytes: each(|counted| counted.wal_bytes),
            stream_bytes: each(|counted| counted.stream_bytes),
            stream_messages: each(|counted| counted.stream_messages),
        };
        println!("{cost:#?}");
        cost
    }
}

impl Cost {
    fn is_at_most(&self, limit: Self) {
        // Relays and the reconciler poll every second; on a slow machine an order's share of that
        // is larger.
        let polls = self.seconds * 30.0;
        let pairs = [
            ("statements", self.statements, limit.statements + polls),
            (
                "round trips to PostgreSQL",
                self.round_trips,
                limit.round_trips + 2.0 * polls,
            ),
            ("messages to NATS", self.messages, limit.messages + polls),
            (
                "bytes of messages",
                self.message_bytes,
                limit.message_bytes + 100.0 * polls,
            ),
            (
                "bytes of WAL",
                self.wal_bytes,
                limit.wal_bytes + 100.0 * polls,
            ),
            ("bytes in streams", self.stream_bytes, limit.stream_bytes),
            (
                "messages in streams",
                self.stream_messages,
                limit.stream_messages,
            ),
        ];
        for (what, cost, limit) in pairs {
            assert!(
                cost <= limit,
                "an order costs {cost:.1} {what}, more than {limit:.1}: {self:?}"
            );
        }
    }
}

async fn text(db: &DatabaseConnection, query: &str) -> String {
    let statement = Statement::from_string(DbBackend::Postgres, format!("SELECT ({query})::text"));
    db.query_one_raw(statement)
        .await
        .unwrap()
        .unwrap()
        .try_get_by_index(0)
        .unwrap()
}

#[tokio::test]
async fn the_cost_of_an_order_stays_within_its_limits() {
    let meters = Meters::start().await;
    meters.shop.customer("alice", 1_000_000).await;
    // Warm up: prepared statements, and the first pages of tables and indexes.
    for _ in 0..10 {
        meters.shop.order("alice", 1).await;
    }
    let one_by_one = meters
        .cost_of(async |shop: &Shop| {
            for _ in 0..ORDERS {
                shop.order("alice", 1).await;
            }
        })
        .await;
    let at_once = meters
        .cost_of(async |shop: &Shop| {
            join_all((0..ORDERS).map(|_| shop.order("alice", 1))).await;
        })
        .await;
    // Up to 10 % above the measured values.
    let limit = Cost {
        seconds: f64::INFINITY,
        statements: 27.0,
        round_trips: 46.0,
        messages: 5.3,
        message_bytes: 1850.0,
        wal_bytes: 6300.0,
        stream_bytes: 1420.0,
        stream_messages: 3.0,
    };
    one_by_one.is_at_most(limit);
    // The number of orders per transaction depends on the machine, but must be above one.
    at_once.is_at_most(Cost {
        statements: 15.0,
        round_trips: 25.0,
        // Depends on the batch sizes: 6,100 to 6,500 were measured.
        wal_bytes: 7000.0,
        ..limit
    });
}
