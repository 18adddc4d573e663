//! The tables, oldest change first. A change that was released is never edited.

use messaging::migration::{MessagingTables, RetentionTable};
use sea_orm_migration::prelude::*;

mod m0002_accounts;

pub(crate) struct Migrator;

#[async_trait::async_trait]
impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        vec![
            Box::new(MessagingTables),
            Box::new(m0002_accounts::Accounts),
            Box::new(RetentionTable),
        ]
    }
}
