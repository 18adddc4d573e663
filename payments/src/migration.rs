//! The schema. A released migration is never changed.

use sea_orm_migration::prelude::*;

mod m0002_accounts;
mod m0008_vacuum;

pub struct Migrator;

#[async_trait::async_trait]
impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        let mut migrations: Vec<Box<dyn MigrationTrait>> = vec![Box::new(m0002_accounts::Accounts)];
        migrations.extend(messaging::migrations());
        migrations.push(messaging::migration(
            "m0008_accounts_vacuum",
            m0008_vacuum::UP,
        ));
        migrations
    }
}
