//! The table of dead letters.

use async_nats::HeaderMap;
use sea_orm::entity::prelude::*;
use sea_orm::{DbErr, FromQueryResult};
use serde_json::json;
use sha2::{Digest, Sha256};
use shared_contracts::{Event, EventId, header};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::inbox::message::{Incoming, RawMessage, header_lines, parse_header_lines};
use crate::outbox::message::Message;
use crate::postgres::{one_row, sql};
use crate::topology::{Stream, Subscription};
use crate::transaction::Transaction;

#[sea_orm::model]
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "dead_letters")]
pub(crate) struct Model {
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: Uuid,
    pub consumer: String,
    /// Event id, or a hash of a message without one, so that repetitions are one dead letter.
    pub message_key: String,
    /// `poison` or `quarantine`.
    pub kind: String,
    pub cause: String,
    pub event_id: Option<Uuid>,
    /// The key of the event, if the message names it.
    #[sea_orm(column_name = "order_id")]
    pub key: Option<Uuid>,
    /// A second subject of the event besides its key, if the message could be decoded.
    pub about: Option<Uuid>,
    pub subject: String,
    pub stream: String,
    pub stream_sequence: i64,
    pub delivered: i32,
    /// The headers as received, as `Name: value` lines.
    pub headers: Vec<u8>,
    /// The body as received.
    pub payload: Vec<u8>,
    /// How often the message was received.
    pub times: i32,
    pub created_at: TimeDateTimeWithTimeZone,
    pub last_seen_at: TimeDateTimeWithTimeZone,
    /// How often it was replayed.
    pub replays: i32,
    /// When it was last replayed. If the message was received later, the replay did not help.
    pub replayed_at: Option<TimeDateTimeWithTimeZone>,
}

impl ActiveModelBehavior for ActiveModel {}

impl Model {
    /// Whether it is unresolved: never replayed, or received again after its last replay.
    pub(crate) fn waits(&self) -> bool {
        self.replayed_at
            .is_none_or(|replayed_at| self.last_seen_at > replayed_at)
    }

    pub(crate) fn header_map(&self) -> HeaderMap {
        parse_header_lines(&self.headers)
    }
}

/// Why a message is a dead letter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Poison(String),
    Quarantine(String),
}

/// A cause may quote the message. The copy for tools contains the cause and must not exceed the
/// broker's message limit.
const CAUSE_CHARACTERS_MAX: usize = 1000;

impl Verdict {
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Poison(_) => "poison",
            Self::Quarantine(_) => "quarantine",
        }
    }

    /// Truncates the cause and removes control characters: PostgreSQL text cannot store NUL, and
    /// the others could control a terminal.
    pub(crate) fn cause(&self) -> String {
        let (Self::Poison(cause) | Self::Quarantine(cause)) = self;
        let printable = cause.chars().map(|c| if c.is_control() { ' ' } else { c });
        printable.take(CAUSE_CHARACTERS_MAX).collect()
    }
}

/// A message to be stored as a dead letter.
#[derive(Clone, Debug)]
pub(crate) struct DeadMessage<'a> {
    pub(crate) raw: RawMessage<'a>,
    pub(crate) verdict: Verdict,
    pub(crate) event_id: Option<Uuid>,
    pub(crate) key: Option<Uuid>,
    pub(crate) about: Option<Uuid>,
}

impl<'a> DeadMessage<'a> {
    pub(crate) fn new<E: Event>(incoming: &Incoming<'a, E>, verdict: Verdict) -> Self {
        let raw = incoming.raw;
        // A message that cannot be decoded may still have its key in a header.
        let (key, about) = match &incoming.content {
            Ok(received) => (Some(received.event.key()), received.event.about()),
            Err(_) => (
                raw.header(header::SUBJECT).and_then(|key| key.parse().ok()),
                None,
            ),
        };
        Self {
            raw,
            verdict,
            event_id: raw.event_id().map(EventId::as_uuid),
            key,
            about,
        }
    }
}

/// Identifies a dead letter: the event id, or a hash of a message without one.
pub fn message_key(subject: &str, headers: Option<&HeaderMap>, payload: &[u8]) -> String {
    let event_id = headers.and_then(|headers| headers.get(header::ID));
    if let Some(event_id) = event_id.and_then(|id| id.as_str().parse::<EventId>().ok()) {
        return event_id.to_string();
    }
    let mut hash = Sha256::new();
    // The hash excludes the broker's message id, which changes each time the message is sent again.
    let headers = header_lines(headers, |name| name != header::MESSAGE_ID);
    for part in [subject.as_bytes(), &headers, payload] {
        hash.update(u64::try_from(part.len()).unwrap_or(u64::MAX).to_be_bytes());
        hash.update(part);
    }
    hash.finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[derive(FromQueryResult)]
struct Stored {
    id: Uuid,
    is_new: bool,
}

/// Stores dead letters. For each new one, enqueues a copy for the stream `copies_to`.
pub(crate) async fn store(
    txn: &Transaction,
    subscription: &Subscription,
    copies_to: Option<&Stream>,
    dead: &[DeadMessage<'_>],
) -> Result<(), DbErr> {
    let mut copies = Vec::new();
    // One query per letter: there are normally none, so batching is not worth it.
    for letter in dead {
        let RawMessage {
            subject,
            headers,
            payload,
            stream_sequence,
            delivered,
        } = letter.raw;
        let message_key = message_key(subject, headers, payload);
        let insert = sql(
            "INSERT INTO dead_letters (id, consumer, message_key, kind, cause, event_id, order_id,
                                       about, subject, stream, stream_sequence, delivered, headers,
                                       payload)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)
             ON CONFLICT (consumer, message_key) DO UPDATE
                 SET times = dead_letters.times + 1, last_seen_at = clock_timestamp(),
                     kind = EXCLUDED.kind, cause = EXCLUDED.cause, subject = EXCLUDED.subject,
                     headers = EXCLUDED.headers, payload = EXCLUDED.payload,
                     stream_sequence = EXCLUDED.stream_sequence, delivered = EXCLUDED.delivered
             RETURNING id, times = 1 AS is_new",
            [
                Uuid::now_v7().into(),
                subscription.consumer.into(),
                message_key.as_str().into(),
                letter.verdict.kind().into(),
                letter.verdict.cause().into(),
                letter.event_id.into(),
                letter.key.into(),
                letter.about.into(),
                subject.into(),
                subscription.stream.into(),
                stream_sequence.into(),
                delivered.into(),
                header_lines(headers, |_| true).into(),
                payload.to_vec().into(),
            ],
        );
        let Stored { id, is_new } = one_row(txn, insert).await?;
        if let Some(stream) = copies_to.filter(|_| is_new) {
            copies.push(copy(stream, subscription, id, &message_key, letter));
        }
    }
    txn.enqueue(copies).await
}

fn copy(
    stream: &Stream,
    subscription: &Subscription,
    id: Uuid,
    message_key: &str,
    letter: &DeadMessage<'_>,
) -> Message {
    let body = json!({
        "dead_letter_id": id,
        "consumer": subscription.consumer,
        "kind": letter.verdict.kind(),
        "cause": letter.verdict.cause(),
        "message_key": message_key,
        "event_id": letter.event_id,
        "order_id": letter.key,
        "about": letter.about,
        "stream": subscription.stream,
        "stream_sequence": letter.raw.stream_sequence,
    });
    Message::notice(
        stream.subject_of(subscription.service),
        stream.name,
        "gozon.dead_letter.v1",
        subscription.service,
        OffsetDateTime::now_utc(),
        &body,
    )
}
