//! The table of orders. A trigger refuses any change of a final order.

use failpoint::removed;
use sea_orm_migration::prelude::*;

pub(crate) struct Orders;

impl MigrationName for Orders {
    fn name(&self) -> &str {
        "m0002_orders"
    }
}

#[expect(
    elided_lifetimes_in_paths,
    reason = "the trait elides them; async_trait turns explicit ones into another signature"
)]
#[async_trait::async_trait]
impl MigrationTrait for Orders {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let db = manager.get_connection();
        db.execute_unprepared(UP).await?;
        if removed!("orders.final") {
            db.execute_unprepared("DROP FUNCTION refuse_change CASCADE")
                .await?;
        }
        Ok(())
    }
}

const UP: &str = r#"
CREATE TABLE orders (
    id                  uuid        PRIMARY KEY,
    user_id             text        NOT NULL,
    amount              bigint      NOT NULL CHECK (amount BETWEEN 1 AND 1000000000000),
    description         text        NOT NULL,
    status              text        NOT NULL DEFAULT 'NEW',
    reason              text,
    idempotency_key     text        NOT NULL,
    request_hash        bytea       NOT NULL,
    placed_event_id     uuid        NOT NULL,
    -- Number of re-asks, and the time of the last one.
    asks                integer     NOT NULL DEFAULT 0 CHECK (asks >= 0),
    asked_at            timestamptz,
    -- The answer that made it final, and its final event. So its timeline needs no other index.
    settlement_event_id uuid,
    final_event_id      uuid,
    created_at          timestamptz NOT NULL,
    updated_at          timestamptz NOT NULL,
    CHECK (
        (status = 'NEW' AND reason IS NULL AND final_event_id IS NULL)
        OR (status = 'FINISHED' AND reason IS NULL AND final_event_id IS NOT NULL)
        OR (status = 'CANCELLED' AND reason IN ('insufficient_funds', 'no_account') AND final_event_id IS NOT NULL)
    )
);
-- I5, I9: one order per key.
CREATE UNIQUE INDEX orders_idempotency_key ON orders (user_id, idempotency_key);
-- The list of one user, newest first.
CREATE INDEX orders_of_user ON orders (user_id, id);
-- Orders that are not final, oldest first. Small, however many orders there are.
CREATE INDEX orders_new ON orders (id) WHERE status = 'NEW';
-- The list of cancelled orders, which may be few among very many.
CREATE INDEX orders_cancelled ON orders (id) WHERE status = 'CANCELLED';

-- State of the reconciler, one row. Orders whose request was published before `lost_at` are
-- re-asked, because the request may be lost.
CREATE TABLE reconciliation (
    id      boolean     PRIMARY KEY DEFAULT true CHECK (id),
    lost_at timestamptz NOT NULL DEFAULT '-infinity'
);
INSERT INTO reconciliation DEFAULT VALUES;

CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% of % is refused', TG_OP, TG_TABLE_NAME USING ERRCODE = '23514';
END $$;
-- I6: a final order never changes. What was ordered never changes either.
CREATE TRIGGER orders_final BEFORE UPDATE ON orders
    FOR EACH ROW WHEN (
        OLD.status <> 'NEW'
        OR (OLD.id, OLD.user_id, OLD.amount, OLD.description, OLD.idempotency_key, OLD.request_hash, OLD.placed_event_id,
            OLD.created_at)
        IS DISTINCT FROM
        (NEW.id, NEW.user_id, NEW.amount, NEW.description, NEW.idempotency_key, NEW.request_hash, NEW.placed_event_id,
         NEW.created_at)
    ) EXECUTE FUNCTION refuse_change();
CREATE TRIGGER orders_never_deleted BEFORE DELETE ON orders
    FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER orders_never_emptied BEFORE TRUNCATE ON orders
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
"#;
