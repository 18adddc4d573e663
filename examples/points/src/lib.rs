//! An example service: it reads the events of orders and gives one loyalty point for every finished
//! order.

use messaging::{
    Begins, Flow, FlowArgs, Handled, Received, Subscriber, Subscription, Transaction, migration,
    migrations, sql,
};
use sea_orm::ConnectionTrait as _;
use sea_orm_migration::{MigrationTrait, MigratorTrait};
use shared_contracts::{Event as _, ORDERS_STREAM, OrderFinished};
use tokio_util::sync::CancellationToken;
use tracing::info;

/// Gives one loyalty point for every finished order.
#[derive(clap::Parser)]
#[command(name = "points", version)]
pub struct Config {
    #[command(flatten)]
    pub flow: FlowArgs,
}

/// Runs the service until `shutdown`.
pub async fn run(config: &Config, shutdown: CancellationToken) -> anyhow::Result<()> {
    let flow = Flow::connect("points", &config.flow).await?;
    flow.reads(AwardPoints).run::<Migrator>(shutdown).await
}

pub struct Migrator;

impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        let mut all = vec![migration("m0001_points", TABLES)];
        all.extend(migrations());
        all
    }
}

const TABLES: &str = "
    CREATE TABLE points (user_id text PRIMARY KEY, points bigint NOT NULL);
    -- One row per order, so that a repeated event awards nothing. Never pruned.
    CREATE TABLE awards (order_id uuid PRIMARY KEY, user_id text NOT NULL);
";

pub struct AwardPoints;

impl Subscriber for AwardPoints {
    type Event = OrderFinished;
    /// The number of points awarded.
    type Effect = i64;

    const SUBSCRIPTION: Subscription = Subscription {
        consumer: "reader-points-order-finished",
        stream: ORDERS_STREAM,
        subject: OrderFinished::SUBJECT,
        service: "points",
        begins: Begins::Oldest,
    };

    async fn handle(
        &self,
        txn: &Transaction,
        batch: &[Received<OrderFinished>],
    ) -> anyhow::Result<Handled<i64>> {
        let orders: Vec<_> = batch
            .iter()
            .map(|one| one.event.order_id.as_uuid())
            .collect();
        let users: Vec<_> = batch
            .iter()
            .map(|one| one.event.user_id.to_string())
            .collect();
        // Rows are locked in the order of their keys, so that replicas do not deadlock.
        let award = sql(
            "WITH new AS (
                 INSERT INTO awards (order_id, user_id)
                 SELECT * FROM unnest($1::uuid[], $2::text[]) AS finished (order_id, user_id)
                 ORDER BY order_id
                 ON CONFLICT DO NOTHING RETURNING user_id),
             counted AS (
                 INSERT INTO points (user_id, points)
                 SELECT user_id, count(*) FROM new GROUP BY user_id ORDER BY user_id
                 ON CONFLICT (user_id) DO UPDATE SET points = points.points + EXCLUDED.points)
             SELECT count(*) AS awarded FROM new",
            [orders.into(), users.into()],
        );
        let row = txn.query_one_raw(award).await?;
        Ok(Handled {
            effect: row.map_or(Ok(0), |row| row.try_get("", "awarded"))?,
            quarantined: Vec::new(),
        })
    }

    fn committed(&self, awarded: i64) {
        if awarded > 0 {
            info!(points = awarded, "Points awarded");
        }
    }

    fn describe(&self, awarded: &i64) -> Option<String> {
        (*awarded > 0).then(|| "One point is awarded for the order.".to_owned())
    }
}
