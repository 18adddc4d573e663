//! PostgreSQL's statistics per statement, and settings to try out.

use anyhow::Context as _;
use ops::audit::Databases;
use sea_orm::{ConnectionTrait as _, DatabaseConnection, DbBackend, FromQueryResult, Statement};
use stack::System;

const WIDTH: usize = 110;

/// Changes settings of PostgreSQL and restarts it, since some need a restart.
pub(crate) async fn configure(
    system: &mut System,
    settings: &[String],
    statements: bool,
) -> anyhow::Result<()> {
    if settings.is_empty() && !statements {
        return Ok(());
    }
    let db = system.postgres().connect("orders").await?;
    for setting in settings {
        let (name, value) = setting
            .split_once('=')
            .with_context(|| format!("{setting:?} is not name=value"))?;
        set(&db, name, value).await?;
    }
    if statements {
        set(&db, "shared_preload_libraries", "pg_stat_statements").await?;
    }
    system.stop("postgres").await?;
    system.start("postgres").await?;
    if statements {
        set(&db, "pg_stat_statements.track_planning", "on").await?;
        db.execute_unprepared("SELECT pg_reload_conf()").await?;
        for name in ["orders", "payments"] {
            let db = system.postgres().connect(name).await?;
            db.execute_unprepared("CREATE EXTENSION pg_stat_statements")
                .await?;
        }
    }
    Ok(())
}

async fn set(db: &DatabaseConnection, name: &str, value: &str) -> anyhow::Result<()> {
    let value = value.replace('\'', "''");
    db.execute_unprepared(&format!("ALTER SYSTEM SET {name} = '{value}'"))
        .await
        .with_context(|| format!("{name} = {value}"))?;
    Ok(())
}

pub(crate) async fn reset(databases: &Databases) -> anyhow::Result<()> {
    databases
        .orders
        .execute_unprepared("SELECT pg_stat_statements_reset()")
        .await?;
    Ok(())
}

#[derive(FromQueryResult)]
struct Row {
    query: String,
    calls: i64,
    rows: i64,
    plan_ms: f64,
    run_ms: f64,
    wal_bytes: i64,
}

/// Shows the statements that took the most time, per database.
pub(crate) async fn show(databases: &Databases) -> anyhow::Result<()> {
    for (name, db) in [
        ("orders", &databases.orders),
        ("payments", &databases.payments),
    ] {
        eprintln!(
            "\n{name:<9} {:>9} {:>9} {:>9} {:>9} {:>9}  statement",
            "calls", "rows", "plan ms", "run ms", "WAL kB"
        );
        let query = "SELECT regexp_replace(query, '\\s+', ' ', 'g') AS query, calls, rows, total_plan_time AS plan_ms,
                            total_exec_time AS run_ms, wal_bytes::bigint AS wal_bytes
                     FROM pg_stat_statements WHERE dbid = (SELECT oid FROM pg_database WHERE datname = current_database())
                     ORDER BY total_plan_time + total_exec_time DESC LIMIT 20";
        for row in Row::find_by_statement(Statement::from_string(DbBackend::Postgres, query))
            .all(db)
            .await?
        {
            let Row {
                query,
                calls,
                rows,
                plan_ms,
                run_ms,
                wal_bytes,
            } = row;
            let text: String = query.chars().take(WIDTH).collect();
            eprintln!(
                "{:<9} {calls:>9} {rows:>9} {plan_ms:>9.0} {run_ms:>9.0} {:>9}  {text}",
                "",
                wal_bytes / 1024
            );
        }
    }
    Ok(())
}
