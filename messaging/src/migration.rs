//! The tables of this crate. Services list it first in their migrators.

use sea_orm_migration::prelude::*;

/// Makes `outbox`, `inbox` and `dead_letters`.
pub struct MessagingTables;

impl MigrationName for MessagingTables {
    fn name(&self) -> &str {
        "m0001_messaging_tables"
    }
}

#[expect(
    elided_lifetimes_in_paths,
    reason = "the trait elides them, and async_trait makes the spelled-out form another signature"
)]
#[async_trait::async_trait]
impl MigrationTrait for MessagingTables {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.get_connection().execute_unprepared(UP).await?;
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager
            .get_connection()
            .execute_unprepared("DROP TABLE dead_letters, inbox, outbox")
            .await?;
        Ok(())
    }
}

/// Makes `retention`, which remembers up to when rows were taken away. After all tables.
pub struct RetentionTable;

impl MigrationName for RetentionTable {
    fn name(&self) -> &str {
        "m0004_retention_table"
    }
}

#[expect(
    elided_lifetimes_in_paths,
    reason = "the trait elides them, and async_trait makes the spelled-out form another signature"
)]
#[async_trait::async_trait]
impl MigrationTrait for RetentionTable {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager
            .get_connection()
            .execute_unprepared(RETENTION)
            .await?;
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager
            .get_connection()
            .execute_unprepared("DROP TABLE retention")
            .await?;
        Ok(())
    }
}

const RETENTION: &str = "
-- One row: outbox rows that were published before this may be gone. What is there when the table is made may have lost some.
CREATE TABLE retention (
    id            boolean     PRIMARY KEY DEFAULT true CHECK (id),
    outbox_before timestamptz NOT NULL DEFAULT clock_timestamp()
);
INSERT INTO retention DEFAULT VALUES;
";

const UP: &str = r#"
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
-- What waits, oldest first. Taken by state, never by a cursor: transactions commit out of order.
CREATE INDEX outbox_pending ON outbox (event_id, n) WHERE published_at IS NULL;
-- The few of them that the broker did not take: looking for these must not walk through the others.
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
