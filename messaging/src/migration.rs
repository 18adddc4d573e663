//! The migrations of this crate, and how to run migrations. Never edit a released migration.

use std::time::Duration;

use sea_orm::{SqlxPostgresConnector, TransactionTrait as _};
use sea_orm_migration::prelude::*;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};

use crate::postgres::{sql, within};

/// Time limit of the check whether the tables are up to date, which would hang on a dead
/// connection. It is retried.
const CHECK_TIMEOUT: Duration = Duration::from_secs(20);
/// Time limit of the migration, longer than any change of a large table takes.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(60 * 60);
/// Key of the advisory lock of a migration (any number).
const MIGRATION_LOCK: i64 = 7_011_987;

/// The migrations of this crate, to be appended to those of the service.
pub fn migrations() -> Vec<Box<dyn MigrationTrait>> {
    vec![
        migration("m0001_messaging_tables", TABLES),
        migration("m0004_retention_table", RETENTION),
        migration("m0005_ask_again", ASK_AGAIN),
        migration("m0006_deferred", DEFERRED),
        migration("m0007_vacuum", VACUUM),
    ]
}

/// Brings the tables up to date. If replicas start together, one migrates and the others wait.
pub(crate) async fn migrate<M: MigratorTrait>(options: &PgConnectOptions) -> Result<(), DbErr> {
    // Migrations need a connection of SeaORM's own type.
    let pool = PgPoolOptions::new().max_connections(1);
    let pool = pool.connect_lazy_with(options.clone());
    let db = SqlxPostgresConnector::from_sqlx_postgres_pool(pool);
    let check = async {
        let txn = db.begin().await?;
        let lock = sql("SELECT pg_advisory_xact_lock($1)", [MIGRATION_LOCK.into()]);
        txn.execute_raw(lock).await?;
        if M::get_pending_migrations(&txn).await?.is_empty() {
            txn.commit().await?;
            return Ok(None);
        }
        Ok::<_, DbErr>(Some(txn))
    };
    let Some(txn) = within(CHECK_TIMEOUT, check).await? else {
        return Ok(());
    };
    // The migration runs in the transaction that holds the lock, so that the lock cannot end
    // earlier. An index on a large table takes longer than the normal statement timeout.
    let change = async {
        txn.execute_unprepared("SET LOCAL statement_timeout = 0")
            .await?;
        M::up(&txn, None).await?;
        txn.commit().await
    };
    within(CHANGE_TIMEOUT, change).await
}

/// A migration that consists of plain SQL.
pub fn migration(name: &'static str, up: &'static str) -> Box<dyn MigrationTrait> {
    Box::new(Sql { name, up })
}

struct Sql {
    name: &'static str,
    up: &'static str,
}

impl MigrationName for Sql {
    fn name(&self) -> &str {
        self.name
    }
}

#[expect(
    elided_lifetimes_in_paths,
    reason = "the trait elides them, and async_trait makes the spelled-out form another signature"
)]
#[async_trait::async_trait]
impl MigrationTrait for Sql {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.get_connection().execute_unprepared(self.up).await?;
        Ok(())
    }
}

const ASK_AGAIN: &str = "
-- One row: requests published before `lost_at` may be lost and are re-asked. Orders had
-- this table before it belonged to this crate.
CREATE TABLE IF NOT EXISTS reconciliation (
    id      boolean     PRIMARY KEY DEFAULT true CHECK (id),
    lost_at timestamptz NOT NULL DEFAULT '-infinity'
);
INSERT INTO reconciliation DEFAULT VALUES ON CONFLICT DO NOTHING;
-- What a dead letter is about besides its order.
ALTER TABLE dead_letters ADD COLUMN about uuid;
";

const DEFERRED: &str = "
-- Messages whose row another transaction has locked, or the database refuses.
CREATE TABLE deferred (
    consumer        text        NOT NULL,
    event_id        uuid        NOT NULL,
    -- Two messages with one event id and different content are two rows.
    payload_hash    bytea       NOT NULL,
    ordering_key    text        NOT NULL,
    ask             integer     NOT NULL,
    stream_sequence bigint      NOT NULL,
    delivered       integer     NOT NULL,
    subject         text        NOT NULL,
    headers         bytea       NOT NULL,
    payload         bytea       NOT NULL,
    deferred_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (consumer, event_id, payload_hash)
);
CREATE INDEX deferred_order ON deferred (consumer, ordering_key, stream_sequence);
";

const VACUUM: &str = "
-- Each row is updated once, when it is published, and leaves an entry in the index of pending rows,
-- which every scan reads until a vacuum. By default a vacuum starts at a fifth of the table.
ALTER TABLE outbox SET (autovacuum_vacuum_scale_factor = 0.02,
                        autovacuum_vacuum_threshold = 10000,
                        autovacuum_analyze_scale_factor = 0.02);
-- Usually empty, and read often while it is not.
ALTER TABLE deferred SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);
";

const RETENTION: &str = "
-- One row: outbox rows that were published before this may be deleted. Rows may already be missing
-- when the table is created.
CREATE TABLE retention (
    id            boolean     PRIMARY KEY DEFAULT true CHECK (id),
    outbox_before timestamptz NOT NULL DEFAULT clock_timestamp()
);
INSERT INTO retention DEFAULT VALUES;
";

const TABLES: &str = r#"
CREATE TABLE outbox (
    event_id        uuid        NOT NULL,
    n               integer     NOT NULL DEFAULT 0 CHECK (n >= 0),
    subject         text        NOT NULL,
    headers         text        NOT NULL,
    payload         text        NOT NULL,
    attempts        integer     NOT NULL DEFAULT 0,
    created_at      timestamptz NOT NULL DEFAULT now(),
    published_at    timestamptz,
    stream_sequence bigint,
    PRIMARY KEY (event_id, n),
    CHECK ((published_at IS NULL) = (stream_sequence IS NULL))
);
-- Pending rows, oldest first. Read by state, not by a cursor: transactions commit out of order.
CREATE INDEX outbox_pending ON outbox (event_id, n) WHERE published_at IS NULL;
-- Rows that the broker did not accept: a scan for these must not read all pending rows.
CREATE INDEX outbox_tried ON outbox (attempts, event_id, n) WHERE published_at IS NULL AND attempts > 0;

CREATE TABLE inbox (
    consumer        text        NOT NULL,
    event_id        uuid        NOT NULL,
    stream_sequence bigint      NOT NULL,
    delivered       integer     NOT NULL,
    received_at     timestamptz NOT NULL DEFAULT now(),
    repeats         integer     NOT NULL DEFAULT 0,
    last_repeat_at  timestamptz,
    PRIMARY KEY (consumer, event_id)
);

CREATE TABLE dead_letters (
    id              uuid        PRIMARY KEY,
    consumer        text        NOT NULL,
    message_key     text        NOT NULL,
    kind            text        NOT NULL CHECK (kind IN ('poison', 'quarantine')),
    cause           text        NOT NULL,
    event_id        uuid,
    order_id        uuid,
    subject         text        NOT NULL,
    stream          text        NOT NULL,
    stream_sequence bigint      NOT NULL,
    delivered       integer     NOT NULL,
    headers         bytea       NOT NULL,
    payload         bytea       NOT NULL,
    times           integer     NOT NULL DEFAULT 1,
    created_at      timestamptz NOT NULL DEFAULT now(),
    last_seen_at    timestamptz NOT NULL DEFAULT now(),
    replays         integer     NOT NULL DEFAULT 0,
    replayed_at     timestamptz,
    UNIQUE (consumer, message_key)
);
"#;
