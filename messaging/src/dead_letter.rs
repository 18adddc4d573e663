//! Messages that were not applied and wait for a person, with the real cause.
//!
//! *Poison* could not be handled: undecodable, unknown version, data that the database refuses. *Quarantine* could,
//! but contradicts what is already decided, and must never be applied by itself.

use std::str::FromStr as _;

use async_nats::{HeaderMap, HeaderName, HeaderValue};
use sea_orm::entity::prelude::*;
use sea_orm::{DatabaseConnection, DatabaseTransaction, DbErr, FromQueryResult};
use serde_json::json;
use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use uuid::Uuid;

use shared_contracts::{DLQ_STREAM, EventId, header};

use crate::db::sql;
use crate::outbox::{self, Message};
use crate::topology::{self, Subscription};

/// A dead letter.
#[sea_orm::model]
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "dead_letters")]
pub struct Model {
    /// Its own id.
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: Uuid,
    /// Who could not take it.
    pub consumer: String,
    /// The event id, or a hash of the message where it has none: the same message is one dead letter.
    pub message_key: String,
    /// `poison` or `quarantine`.
    pub kind: String,
    /// Why, in words.
    pub cause: String,
    /// The fact, if the message says which.
    pub event_id: Option<Uuid>,
    /// The order, if the message says which.
    pub order_id: Option<Uuid>,
    /// Where it was published.
    pub subject: String,
    /// Stream it came from.
    pub stream: String,
    /// Its place there.
    pub stream_sequence: i64,
    /// Which delivery of the message this was.
    pub delivered: i32,
    /// The headers as received, `Name: value` lines.
    pub headers: Vec<u8>,
    /// The body as received.
    pub payload: Vec<u8>,
    /// How often it came.
    pub times: i32,
    /// When it first came.
    pub created_at: TimeDateTimeWithTimeZone,
    /// When it last came.
    pub last_seen_at: TimeDateTimeWithTimeZone,
    /// How often an operator sent it again.
    pub replays: i32,
    /// When that was last done. If it came back later, the replay did not help.
    pub replayed_at: Option<TimeDateTimeWithTimeZone>,
}

impl ActiveModelBehavior for ActiveModel {}

impl Model {
    /// The message as it was received, to be sent again: the same fact under a message id that the broker has never
    /// seen, so that its memory of ids cannot swallow it. Of the headers that speak to the broker (which batch a message
    /// was stored with, for one) nothing else is kept.
    pub fn message(&self) -> (HeaderMap, Vec<u8>) {
        let mut headers = HeaderMap::new();
        for line in String::from_utf8_lossy(&self.headers).lines() {
            let Some((name, value)) = line
                .split_once(": ")
                .filter(|(name, _)| !name.starts_with("Nats-"))
            else {
                continue;
            };
            if let (Ok(name), Ok(value)) =
                (HeaderName::from_str(name), HeaderValue::from_str(value))
            {
                headers.append(name, value);
            }
        }
        let fact = self
            .event_id
            .map_or_else(|| self.id.to_string(), |event_id| event_id.to_string());
        headers.insert(
            header::MESSAGE_ID,
            format!("{fact}.d{}", Uuid::new_v4().simple()),
        );
        (headers, self.payload.clone())
    }

    /// Whether it waits for a person: never sent again, or back since.
    pub fn waits(&self) -> bool {
        self.replayed_at
            .is_none_or(|replayed_at| self.last_seen_at > replayed_at)
    }
}

/// The database's clock, by which replays and returns are compared.
pub async fn clock(db: &DatabaseConnection) -> Result<OffsetDateTime, DbErr> {
    let row = db
        .query_one_raw(sql("SELECT clock_timestamp() AS now", []))
        .await?;
    row.ok_or_else(|| DbErr::RecordNotFound("the time".to_owned()))?
        .try_get("", "now")
}

/// Notes that a dead letter was sent again, with the time from before it was: it may be back already.
pub async fn note_replay(
    db: &DatabaseConnection,
    id: Uuid,
    at: OffsetDateTime,
) -> Result<(), DbErr> {
    db.execute_raw(sql(
        "UPDATE dead_letters SET replays = replays + 1, replayed_at = $2 WHERE id = $1",
        [id.into(), at.into()],
    ))
    .await?;
    Ok(())
}

/// Why a message is a dead letter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It cannot be handled.
    Poison(String),
    /// It contradicts what is decided.
    Quarantine(String),
}

/// A cause may quote the message, which may be as large as the broker allows; its copy for tools must fit too.
const CAUSE_CHARACTERS_MAX: usize = 1000;

/// A cause as it is stored: not too long, and without what PostgreSQL does not take in a text (NUL) or a terminal obeys.
pub(crate) fn short(cause: &str) -> String {
    cause
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(CAUSE_CHARACTERS_MAX)
        .collect()
}

impl Verdict {
    fn short_cause(&self) -> String {
        short(self.cause())
    }

    fn kind(&self) -> &'static str {
        match self {
            Self::Poison(_) => "poison",
            Self::Quarantine(_) => "quarantine",
        }
    }

    pub(crate) fn cause(&self) -> &str {
        match self {
            Self::Poison(cause) | Self::Quarantine(cause) => cause,
        }
    }
}

/// A message on its way to the table.
pub(crate) struct DeadMessage<'a> {
    pub(crate) verdict: Verdict,
    pub(crate) message: &'a async_nats::Message,
    pub(crate) event_id: Option<Uuid>,
    pub(crate) order_id: Option<Uuid>,
    pub(crate) stream_sequence: i64,
    pub(crate) delivered: i32,
}

/// What makes two messages the same dead letter: the event id, or a hash of the message where it has none.
pub fn message_key(message: &async_nats::Message) -> String {
    let event_id = message
        .headers
        .as_ref()
        .and_then(|headers| headers.get(header::ID));
    if let Some(event_id) = event_id.and_then(|id| id.as_str().parse::<EventId>().ok()) {
        return event_id.to_string();
    }
    let mut hash = Sha256::new();
    // Without the broker's id, which is new each time the same thing is sent again.
    let headers = header_lines(message.headers.as_ref(), |name| name != header::MESSAGE_ID);
    for part in [message.subject.as_bytes(), &headers, &message.payload] {
        hash.update(u64::try_from(part.len()).unwrap_or(u64::MAX).to_be_bytes());
        hash.update(part);
    }
    hash.finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

fn header_lines(headers: Option<&HeaderMap>, wanted: impl Fn(&str) -> bool) -> Vec<u8> {
    let mut lines: Vec<String> = headers
        .into_iter()
        .flat_map(HeaderMap::iter)
        .filter(|(name, _)| wanted(name.as_ref()))
        .flat_map(|(name, values)| values.iter().map(move |value| format!("{name}: {value}\n")))
        .collect();
    lines.sort();
    lines.concat().into_bytes()
}

#[derive(FromQueryResult)]
struct Stored {
    id: Uuid,
    is_new: bool,
}

/// Stores dead letters, and for each new one a copy to be published for tools.
pub(crate) async fn bury(
    txn: &DatabaseTransaction,
    subscription: &Subscription,
    dead: &[DeadMessage<'_>],
) -> Result<(), DbErr> {
    let mut copies = Vec::new();
    // A query per message: there are none on a healthy day, and a flood of them is slow on purpose of nobody.
    for letter in dead {
        let message_key = message_key(letter.message);
        let stored = Stored::find_by_statement(sql(
            "INSERT INTO dead_letters (id, consumer, message_key, kind, cause, event_id, order_id, subject, stream,
                                       stream_sequence, delivered, headers, payload)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)
             ON CONFLICT (consumer, message_key) DO UPDATE SET times = dead_letters.times + 1, last_seen_at = clock_timestamp(), cause = EXCLUDED.cause
             RETURNING id, times = 1 AS is_new",
            [
                Uuid::now_v7().into(),
                subscription.consumer.into(),
                message_key.as_str().into(),
                letter.verdict.kind().into(),
                letter.verdict.short_cause().into(),
                letter.event_id.into(),
                letter.order_id.into(),
                letter.message.subject.as_str().into(),
                subscription.stream.into(),
                letter.stream_sequence.into(),
                letter.delivered.into(),
                header_lines(letter.message.headers.as_ref(), |_| true).into(),
                letter.message.payload.to_vec().into(),
            ],
        ))
        .one(txn)
        .await?
        .ok_or_else(|| DbErr::RecordNotFound("a dead letter that was just stored".to_owned()))?;
        if stored.is_new {
            let body = json!({
                "dead_letter_id": stored.id,
                "consumer": subscription.consumer,
                "kind": letter.verdict.kind(),
                "cause": letter.verdict.short_cause(),
                "message_key": message_key,
                "event_id": letter.event_id,
                "order_id": letter.order_id,
                "stream": subscription.stream,
                "stream_sequence": letter.stream_sequence,
            });
            copies.push(Message::notice(
                topology::dlq_subject(subscription.service),
                DLQ_STREAM,
                "gozon.dead_letter.v1",
                subscription.service,
                OffsetDateTime::now_utc(),
                &body,
            ));
        }
    }
    // Nobody waits for a copy: the relay finds it.
    let _later = outbox::enqueue(txn, copies).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_sent_again_without_what_spoke_to_the_broker() {
        let headers = "Gozon-Ask: 2\nNats-Batch-Commit: 1\nNats-Batch-Id: b\nNats-Batch-Sequence: 40\nNats-Expected-Stream: ORDERS\n\
                       Nats-Msg-Id: old\nce-id: 01933f3c-7d5a-7b60-9d6f-000000000001\n";
        let letter = Model {
            id: Uuid::now_v7(),
            consumer: "payments-order-placed".to_owned(),
            message_key: "key".to_owned(),
            kind: "poison".to_owned(),
            cause: "cause".to_owned(),
            event_id: Some("01933f3c-7d5a-7b60-9d6f-000000000001".parse().unwrap()),
            order_id: None,
            subject: "gozon.orders.placed".to_owned(),
            stream: "ORDERS".to_owned(),
            stream_sequence: 1,
            delivered: 1,
            headers: headers.as_bytes().to_vec(),
            payload: b"{}".to_vec(),
            times: 1,
            created_at: OffsetDateTime::UNIX_EPOCH,
            last_seen_at: OffsetDateTime::UNIX_EPOCH,
            replays: 0,
            replayed_at: None,
        };
        let (headers, payload) = letter.message();
        let mut names: Vec<String> = headers.iter().map(|(name, _)| name.to_string()).collect();
        names.sort();
        assert_eq!(
            (names, payload),
            (
                vec![
                    "Gozon-Ask".to_owned(),
                    "Nats-Msg-Id".to_owned(),
                    "ce-id".to_owned()
                ],
                b"{}".to_vec()
            )
        );
        let message_id = headers.get(header::MESSAGE_ID).unwrap().as_str();
        assert!(
            message_id.starts_with("01933f3c-7d5a-7b60-9d6f-000000000001.d"),
            "{message_id}"
        );
    }
}
