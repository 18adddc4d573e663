//! Dead letters as operators see them: over HTTP, and with `gozon`.

use std::fmt;

use sea_orm::{
    ColumnTrait as _, ConnectionTrait, DbErr, EntityTrait as _, QueryFilter as _, QueryOrder as _,
    QuerySelect as _,
};
use serde::Serialize;
use shared_contracts::timestamp;
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::dead_letters::table;

/// A message that was not applied.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct DeadLetter {
    pub id: Uuid,
    /// Consumer that could not apply it.
    pub consumer: String,
    pub kind: DeadLetterKind,
    pub cause: String,
    /// Whether it is unresolved: never replayed, or received again after its last replay.
    pub waits: bool,
    #[schema(required = true)]
    pub event_id: Option<Uuid>,
    #[serde(rename = "order_id")]
    #[schema(required = true)]
    pub key: Option<Uuid>,
    /// A second subject of the message besides the order, for example a refund.
    #[schema(required = true)]
    pub about: Option<Uuid>,
    pub subject: String,
    pub stream: String,
    pub stream_sequence: i64,
    /// Delivery attempt of the broker, counted from 1.
    pub delivered: i32,
    /// The headers as received, `Name: value` lines.
    pub headers: String,
    /// The body as received.
    pub payload: String,
    /// How often the message was received.
    pub times: i32,
    #[serde(serialize_with = "timestamp::serialize")]
    #[schema(value_type = String, format = DateTime)]
    pub created_at: OffsetDateTime,
    #[serde(serialize_with = "timestamp::serialize")]
    #[schema(value_type = String, format = DateTime)]
    pub last_seen_at: OffsetDateTime,
    /// How often it was replayed.
    pub replays: i32,
    #[serde(serialize_with = "timestamp::serialize_option")]
    #[schema(required = true, value_type = Option<String>, format = DateTime)]
    pub replayed_at: Option<OffsetDateTime>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DeadLetterKind {
    /// It cannot be handled.
    Poison,
    /// It contradicts an earlier decision.
    Quarantine,
}

impl fmt::Display for DeadLetterKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Poison => "poison",
            Self::Quarantine => "quarantine",
        })
    }
}

impl From<table::Model> for DeadLetter {
    fn from(row: table::Model) -> Self {
        Self {
            id: row.id,
            waits: row.waits(),
            consumer: row.consumer,
            kind: match row.kind.as_str() {
                "quarantine" => DeadLetterKind::Quarantine,
                _ => DeadLetterKind::Poison,
            },
            cause: row.cause,
            event_id: row.event_id,
            key: row.key,
            about: row.about,
            subject: row.subject,
            stream: row.stream,
            stream_sequence: row.stream_sequence,
            delivered: row.delivered,
            headers: String::from_utf8_lossy(&row.headers).into_owned(),
            payload: String::from_utf8_lossy(&row.payload).into_owned(),
            times: row.times,
            created_at: row.created_at,
            last_seen_at: row.last_seen_at,
            replays: row.replays,
            replayed_at: row.replayed_at,
        }
    }
}

impl DeadLetter {
    /// Up to `limit` dead letters older than `before`, newest first.
    pub async fn page(
        db: &impl ConnectionTrait,
        before: Option<Uuid>,
        limit: u64,
    ) -> Result<Vec<Self>, DbErr> {
        let mut query = table::Entity::find()
            .order_by_desc(table::Column::Id)
            .limit(limit);
        if let Some(before) = before {
            query = query.filter(table::Column::Id.lt(before));
        }
        let rows = query.all(db).await?;
        Ok(rows.into_iter().map(Self::from).collect())
    }

    pub async fn find(db: &impl ConnectionTrait, id: Uuid) -> Result<Option<Self>, DbErr> {
        let row = table::Entity::find_by_id(id).one(db).await?;
        Ok(row.map(Self::from))
    }

    /// Deletes a dead letter for good. Returns whether it existed.
    pub async fn delete(db: &impl ConnectionTrait, id: Uuid) -> Result<bool, DbErr> {
        let deleted = table::Entity::delete_by_id(id).exec(db).await?;
        Ok(deleted.rows_affected > 0)
    }
}
