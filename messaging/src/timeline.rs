//! The timeline of one key from a service's tables: messages that were enqueued, published,
//! received, repeated or dead-lettered. Each service adds its own steps.

use sea_orm::{ColumnTrait as _, DbErr, EntityTrait as _, QueryFilter as _, QueryOrder as _};
use serde_json::Value;
use shared_contracts::timeline::{Step, StepKind, StepMessage};
use shared_contracts::{Event as _, header};
use uuid::Uuid;

use crate::database::Database;
use crate::dead_letters::table as dead_letters;
use crate::inbox::table as inbox;
use crate::outbox::table as outbox;
use crate::subscriber::Subscriber;

/// The steps of one service.
pub struct TimelineSteps<'a> {
    pub db: &'a Database,
    pub service: &'static str,
}

impl TimelineSteps<'_> {
    /// Each publication of an event. Empty if its outbox rows were pruned.
    pub async fn sent(&self, event_id: Uuid) -> Result<Vec<Step>, DbErr> {
        let rows = outbox::Entity::find()
            .filter(outbox::Column::EventId.eq(event_id))
            .order_by_asc(outbox::Column::N)
            .all(self.db)
            .await?;
        let mut steps = Vec::new();
        for row in rows {
            let headers: Value =
                serde_json::from_str(&row.headers).unwrap_or(Value::String(row.headers));
            let enqueued = Step {
                event: headers[header::TYPE].as_str().map(str::to_owned),
                event_id: Some(event_id),
                n: Some(row.n),
                ..Step::new(row.created_at, self.service, StepKind::Enqueued)
            };
            let published = row.published_at.map(|at| Step {
                at,
                step: StepKind::Published,
                times: Some(row.attempts),
                stream_sequence: row.stream_sequence,
                ..enqueued.clone()
            });
            let payload = serde_json::from_str(&row.payload).unwrap_or(Value::String(row.payload));
            let message = StepMessage {
                subject: row.subject,
                headers,
                payload,
            };
            steps.push(Step {
                message: Some(message),
                ..enqueued
            });
            steps.extend(published);
        }
        Ok(steps)
    }

    /// The first receipt and the last repetition of an event. Empty if its inbox row was pruned.
    pub async fn received<S: Subscriber>(&self, event_id: Uuid) -> Result<Vec<Step>, DbErr> {
        let key = (S::SUBSCRIPTION.consumer.to_owned(), event_id);
        let Some(row) = inbox::Entity::find_by_id(key).one(self.db).await? else {
            return Ok(Vec::new());
        };
        let taken = Step {
            event: Some(S::Event::TYPE.to_owned()),
            event_id: Some(event_id),
            times: Some(row.delivered),
            stream_sequence: Some(row.stream_sequence),
            ..Step::new(row.received_at, self.service, StepKind::Taken)
        };
        let repeated = row.last_repeat_at.map(|at| Step {
            at,
            step: StepKind::Repeated,
            times: Some(row.repeats),
            stream_sequence: None,
            ..taken.clone()
        });
        Ok([Some(taken), repeated].into_iter().flatten().collect())
    }

    /// Dead letters with this key.
    pub async fn dead_lettered(&self, key: Uuid) -> Result<Vec<Step>, DbErr> {
        let letters = dead_letters::Entity::find()
            .filter(dead_letters::Column::Key.eq(key))
            .all(self.db)
            .await?;
        let step = |letter: dead_letters::Model| Step {
            event_id: letter.event_id,
            times: Some(letter.times),
            stream_sequence: Some(letter.stream_sequence),
            outcome: Some(letter.kind),
            reason: Some(letter.cause),
            ..Step::new(letter.created_at, self.service, StepKind::DeadLettered)
        };
        Ok(letters.into_iter().map(step).collect())
    }
}
