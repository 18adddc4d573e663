//! Accounts, transfers and decisions. Constraints and triggers enforce the rules about money.

use failpoint::removed;
use sea_orm_migration::prelude::*;

pub(crate) struct Accounts;

impl MigrationName for Accounts {
    fn name(&self) -> &str {
        "m0002_accounts"
    }
}

#[expect(
    elided_lifetimes_in_paths,
    reason = "the trait elides them; async_trait turns explicit ones into another signature"
)]
#[async_trait::async_trait]
impl MigrationTrait for Accounts {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let db = manager.get_connection();
        db.execute_unprepared(UP).await?;
        if removed!("payments.append_only") {
            db.execute_unprepared("DROP FUNCTION refuse_change CASCADE")
                .await?;
        }
        if removed!("account.lock") {
            db.execute_unprepared(
                "ALTER TABLE transfers DROP CONSTRAINT transfers_user_id_entry_no_key",
            )
            .await?;
        }
        Ok(())
    }
}

const UP: &str = r#"
CREATE TABLE accounts (
    user_id         text        PRIMARY KEY,
    -- I4: no committed state has a negative balance. The upper limit keeps it exact in JavaScript.
    balance         bigint      NOT NULL DEFAULT 0 CHECK (balance BETWEEN 0 AND 9000000000000000),
    -- Number of the newest entry in the user's statement; rises under the row's lock.
    entry_no        bigint      NOT NULL DEFAULT 0,
    idempotency_key text        NOT NULL,
    created_at      timestamptz NOT NULL
);

-- I3: every movement of money is one row that names both sides. The shop and the outside world are
-- constants and have no row in `accounts`.
CREATE TABLE transfers (
    id              uuid        PRIMARY KEY,
    kind            text        NOT NULL,
    user_id         text        NOT NULL,
    entry_no        bigint      NOT NULL,
    debit_account   text        NOT NULL,
    credit_account  text        NOT NULL,
    amount          bigint      NOT NULL CHECK (amount BETWEEN 1 AND 1000000000000),
    balance_after   bigint      NOT NULL CHECK (balance_after BETWEEN 0 AND 9000000000000000),
    order_id        uuid,
    idempotency_key text,
    request_hash    bytea,
    created_at      timestamptz NOT NULL DEFAULT now(),
    UNIQUE (user_id, entry_no),
    CHECK (
        (kind = 'payment' AND order_id IS NOT NULL AND idempotency_key IS NULL
            AND debit_account = 'user:' || user_id AND credit_account = 'shop')
        OR (kind = 'deposit' AND order_id IS NULL AND idempotency_key IS NOT NULL AND request_hash IS NOT NULL
            AND debit_account = 'world' AND credit_account = 'user:' || user_id)
    )
);
-- I1: at most one debit per order, for ever.
CREATE UNIQUE INDEX transfers_payment_of_order ON transfers (order_id) WHERE kind = 'payment';
-- I5, I9: one deposit per key.
CREATE UNIQUE INDEX transfers_idempotency_key ON transfers (user_id, idempotency_key) WHERE idempotency_key IS NOT NULL;

-- How the payment of an order ended: paid or declined, decided once, never deleted.
CREATE TABLE payments (
    order_id         uuid        PRIMARY KEY,
    user_id          text        NOT NULL,
    amount           bigint      NOT NULL CHECK (amount BETWEEN 1 AND 1000000000000),
    request_hash     bytea       NOT NULL,
    outcome          text        NOT NULL,
    reason           text,
    transfer_id      uuid,
    request_event_id uuid        NOT NULL,
    event_id         uuid        NOT NULL,
    last_ask         integer     NOT NULL DEFAULT 0,
    decided_at       timestamptz NOT NULL DEFAULT now(),
    CHECK (
        (outcome = 'paid' AND reason IS NULL AND transfer_id IS NOT NULL)
        OR (outcome = 'declined' AND reason IN ('insufficient_funds', 'no_account') AND transfer_id IS NULL)
    )
);

-- I11: transfers and decisions are append-only, except for the counter of re-asks.
CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% of % is refused: its rows are append-only', TG_OP, TG_TABLE_NAME USING ERRCODE = '23514';
END $$;
CREATE TRIGGER transfers_append_only BEFORE UPDATE OR DELETE ON transfers
    FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER transfers_never_emptied BEFORE TRUNCATE ON transfers
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER payments_never_deleted BEFORE DELETE ON payments
    FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER payments_never_emptied BEFORE TRUNCATE ON payments
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER payments_append_only BEFORE UPDATE ON payments
    FOR EACH ROW WHEN (
        (OLD.order_id, OLD.user_id, OLD.amount, OLD.request_hash, OLD.outcome, OLD.reason, OLD.transfer_id,
         OLD.request_event_id, OLD.event_id, OLD.decided_at)
        IS DISTINCT FROM
        (NEW.order_id, NEW.user_id, NEW.amount, NEW.request_hash, NEW.outcome, NEW.reason, NEW.transfer_id,
         NEW.request_event_id, NEW.event_id, NEW.decided_at)
        OR NEW.last_ask < OLD.last_ask
    ) EXECUTE FUNCTION refuse_change();
"#;
