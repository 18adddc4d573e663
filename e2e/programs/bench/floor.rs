//! Baselines, measured in the same run: PostgreSQL with one debit per transaction, and the broker
//! with one PubAck per message.

use std::fs;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use async_nats::HeaderMap;
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::stream;
use broker::{Broker, BrokerConfig};
use futures_util::{StreamExt as _, stream as futures_stream};
use messaging::{Stream, TopologySettings};
use sea_orm::ConnectionTrait as _;
use stack::System;
use tokio::process::Command;
use uuid::Uuid;

/// Messages in flight.
const WINDOW: usize = 256;
const STREAM: &str = "BENCH";

/// The tables that one debit touches, with the same keys as in payments.
const TABLES: &str = "
    CREATE TABLE inbox (consumer text, event_id uuid, stream_sequence bigint NOT NULL, delivered integer NOT NULL,
        received_at timestamptz NOT NULL DEFAULT now(), PRIMARY KEY (consumer, event_id));
    CREATE TABLE accounts (user_id text PRIMARY KEY, balance bigint NOT NULL CHECK (balance >= 0), entry_no bigint NOT NULL);
    CREATE TABLE transfers (id uuid PRIMARY KEY, user_id text NOT NULL, entry_no bigint NOT NULL, amount bigint NOT NULL,
        balance_after bigint NOT NULL, order_id uuid UNIQUE, created_at timestamptz NOT NULL DEFAULT now(), UNIQUE (user_id, entry_no));
    CREATE TABLE outbox (event_id uuid, n integer, subject text NOT NULL, headers text NOT NULL, payload text NOT NULL,
        created_at timestamptz NOT NULL DEFAULT now(), published_at timestamptz, PRIMARY KEY (event_id, n));
    CREATE INDEX outbox_pending ON outbox (event_id, n) WHERE published_at IS NULL;
    INSERT INTO accounts SELECT 'user-' || n, 1000000000000, 0 FROM generate_series(1, 1000) n";

const DEBIT: &str = r#"\set user random(1, 1000)
BEGIN;
INSERT INTO inbox (consumer, event_id, stream_sequence, delivered) VALUES ('floor', gen_random_uuid(), 1, 1);
UPDATE accounts SET balance = balance - 1, entry_no = entry_no + 1 WHERE user_id = 'user-' || :user RETURNING balance, entry_no \gset
INSERT INTO transfers (id, user_id, entry_no, amount, balance_after, order_id) VALUES (gen_random_uuid(), 'user-' || :user, :entry_no, 1, :balance, gen_random_uuid());
INSERT INTO outbox (event_id, n, subject, headers, payload) VALUES (gen_random_uuid(), 0, 'gozon.payments.settled', '{"ce-type":"gozon.payment.settled.v1","ce-source":"payments"}', '{"order_id":"01933f3c-7d5a-7b60-9d6f-3f0b4b1f2a11","user_id":"user-1","amount":1,"outcome":"paid"}');
COMMIT;
"#;

/// Creates the baseline's own database.
pub(crate) async fn prepare(system: &System) -> anyhow::Result<()> {
    let password = &system.folder().secrets.postgres_payments;
    system.postgres().ensure_database("floor", password).await?;
    system
        .postgres()
        .connect("floor")
        .await?
        .execute_unprepared(TABLES)
        .await?;
    fs::write(system.folder().path().join("debit.sql"), DEBIT)?;
    Ok(())
}

/// Debits per second by `clients` clients, one transaction each.
pub(crate) async fn debits(system: &System, clients: u32, time: Duration) -> anyhow::Result<f64> {
    let folder = system.folder().path();
    let db = system.postgres().connect("floor").await?;
    db.execute_unprepared("TRUNCATE inbox, transfers, outbox")
        .await?;
    db.execute_unprepared("UPDATE accounts SET entry_no = 0")
        .await?;
    db.execute_unprepared("VACUUM accounts").await?;
    let output = Command::new(system.postgres().programs.join("pgbench"))
        .args([
            "--no-vacuum",
            "--protocol=prepared",
            "--jobs=1",
            "--host=127.0.0.1",
            "--username=postgres",
        ])
        .arg(format!("--client={clients}"))
        .arg(format!("--time={}", time.as_secs().max(1)))
        .arg(format!("--port={}", system.ports().postgres))
        .arg("--file")
        .arg(folder.join("debit.sql"))
        .arg("floor")
        .env("PGPASSWORD", &system.folder().secrets.postgres_superuser)
        .stdin(Stdio::null())
        .output()
        .await
        .context("pgbench cannot be started")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.success(),
        "pgbench failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let rate = text.lines().find_map(|line| {
        line.strip_prefix("tps = ")?
            .split_whitespace()
            .next()?
            .parse()
            .ok()
    });
    rate.with_context(|| format!("pgbench printed no tps:\n{text}"))
}

/// Messages per second that the broker acknowledges, each with a message id.
pub(crate) async fn publishes(system: &System, time: Duration) -> anyhow::Result<f64> {
    let config = BrokerConfig {
        url: system.nats().url(),
        user: "ops".to_owned(),
        password: system.folder().secrets.nats_ops.clone().into(),
        name: "bench".to_owned(),
    };
    let broker = Broker::connect(config).await?;
    broker.until_connected().await;
    let shipped = Stream::events(STREAM, "gozon.bench.>").config(&TopologySettings::default());
    let config = stream::Config {
        name: STREAM.to_owned(),
        subjects: vec!["gozon.bench".to_owned()],
        deny_purge: false,
        ..shipped
    };
    broker
        .jetstream()
        .get_or_create_stream(config)
        .await
        .context("the stream of the baseline cannot be created")?;
    let begun = Instant::now();
    let sent = futures_stream::iter(std::iter::repeat_n((), usize::MAX))
        .take_while(|()| std::future::ready(begun.elapsed() < time))
        .map(async |()| {
            let mut headers = HeaderMap::new();
            headers.insert("Nats-Msg-Id", Uuid::now_v7().to_string());
            let message = PublishMessage::build()
                .headers(headers)
                .payload(vec![b'x'; 200].into());
            broker
                .jetstream()
                .send_publish("gozon.bench", message)
                .await?
                .await?;
            anyhow::Ok(())
        })
        .buffer_unordered(WINDOW)
        .fold(Ok(0_u64), async |count, sent| {
            count.and_then(|count| sent.map(|()| count + 1))
        })
        .await?;
    let rate = sent as f64 / begun.elapsed().as_secs_f64();
    broker
        .jetstream()
        .delete_stream(STREAM)
        .await
        .context("the stream of the baseline cannot be deleted")?;
    Ok(rate)
}
