//! Inserts that block or are refused until a test releases them.

use sea_orm::{ConnectionTrait as _, DatabaseConnection, DbErr};

/// While it is held, no row is inserted into the table. Ends with [`release`](Self::release).
#[derive(Debug)]
pub struct HeldInserts {
    db: DatabaseConnection,
}

impl HeldInserts {
    /// Inserts wait. Unlike a lock this meets no `lock_timeout`.
    pub async fn blocked(db: DatabaseConnection, table: &str) -> Result<Self, DbErr> {
        let body = "WHILE EXISTS (SELECT FROM held) LOOP
                        PERFORM pg_sleep(0.01);
                    END LOOP;";
        Self::hold(db, table, body).await
    }

    /// Inserts fail with this SQLSTATE.
    pub async fn refused(
        db: DatabaseConnection,
        table: &str,
        sqlstate: &str,
    ) -> Result<Self, DbErr> {
        let body = format!(
            "IF EXISTS (SELECT FROM held) THEN
                 RAISE EXCEPTION 'held by a test' USING ERRCODE = '{sqlstate}';
             END IF;"
        );
        Self::hold(db, table, &body).await
    }

    async fn hold(db: DatabaseConnection, table: &str, body: &str) -> Result<Self, DbErr> {
        db.execute_unprepared(&format!(
            "CREATE TABLE IF NOT EXISTS held (id integer);
             INSERT INTO held VALUES (1);
             -- The service may not read the table itself.
             CREATE OR REPLACE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
             BEGIN
                 {body}
                 RETURN NEW;
             END $$;
             CREATE OR REPLACE TRIGGER hold BEFORE INSERT ON {table}
                 FOR EACH ROW EXECUTE FUNCTION hold();"
        ))
        .await?;
        Ok(Self { db })
    }

    pub async fn release(&self) -> Result<(), DbErr> {
        self.db.execute_unprepared("DELETE FROM held").await?;
        Ok(())
    }
}
