//! The schema. A released migration is never changed.

use sea_orm_migration::prelude::*;

mod m0002_orders;
mod m0003_stored_at;
mod m0008_vacuum;

pub struct Migrator;

#[async_trait::async_trait]
impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        let mut migrations: Vec<Box<dyn MigrationTrait>> = vec![
            Box::new(m0002_orders::Orders),
            messaging::migration("m0003_stored_at", m0003_stored_at::UP),
        ];
        migrations.extend(messaging::migrations());
        migrations.push(messaging::migration(
            "m0008_orders_vacuum",
            m0008_vacuum::UP,
        ));
        migrations
    }
}
