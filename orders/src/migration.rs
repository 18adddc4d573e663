//! The tables, oldest change first. A change that was released is never edited.

use messaging::migration::{MessagingTables, RetentionTable};
use sea_orm_migration::prelude::*;

mod m0002_orders;
mod m0003_stored_at;

pub(crate) struct Migrator;

#[async_trait::async_trait]
impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        vec![
            Box::new(MessagingTables),
            Box::new(m0002_orders::Orders),
            Box::new(m0003_stored_at::StoredAt),
            Box::new(RetentionTable),
        ]
    }
}
