//! When an order was stored, by the clock of the database: whether it is late is never asked of another clock.

use sea_orm_migration::prelude::*;

pub(crate) struct StoredAt;

impl MigrationName for StoredAt {
    fn name(&self) -> &str {
        "m0003_stored_at"
    }
}

#[expect(
    elided_lifetimes_in_paths,
    reason = "the trait elides them, and async_trait makes the spelled-out form another signature"
)]
#[async_trait::async_trait]
impl MigrationTrait for StoredAt {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        // Rewrites nothing: orders that are there are taken for as old as this.
        let add = "ALTER TABLE orders ADD COLUMN stored_at timestamptz NOT NULL DEFAULT now()";
        manager.get_connection().execute_unprepared(add).await?;
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager
            .get_connection()
            .execute_unprepared("ALTER TABLE orders DROP COLUMN stored_at")
            .await?;
        Ok(())
    }
}
