//! Sends outbox rows to the broker. A few rows are sent concurrently; many are sent as one atomic
//! batch, which the broker stores with one fsync.

use std::collections::BTreeMap;
use std::str::FromStr as _;

use async_nats::jetstream::context::{PublishAckFuture, PublishError, PublishErrorKind};
use async_nats::jetstream::message::PublishMessage;
use async_nats::{HeaderMap, HeaderName, HeaderValue, header as nats_header};
use failpoint::{Injected, failpoint};
use futures_util::future::join_all;
use tokio::time::Instant;
use tracing::{debug, error};
use uuid::Uuid;

use shared_contracts::{SPEC_VERSION, header};

use broker::Broker;

use crate::outbox::table::{Acknowledged, Pending};

/// With fewer rows, an atomic batch costs the broker more than it saves.
const ATOMIC_MIN: usize = 32;
/// Upper bound of the bytes that the broker adds to a message.
const OVERHEAD: usize = 1024;

/// The outcome of sending rows.
#[derive(Default)]
pub(crate) struct Sent {
    connection_number: u64,
    /// Rows that the broker has stored, now or earlier.
    pub(crate) acknowledged: Vec<Acknowledged>,
    /// Rows without a PubAck: it is unknown whether they are stored.
    pub(crate) unacknowledged: Vec<(Uuid, i32)>,
    /// Whether a row failed because no stream stores its subject.
    pub(crate) stream_missing: bool,
    pub(crate) error: Option<PublishError>,
}

#[derive(Clone)]
struct Outgoing<'a> {
    row: &'a Pending,
    headers: HeaderMap,
}

/// Sent messages whose PubAck is pending.
enum InFlight<'a> {
    One(&'a Outgoing<'a>, PublishAckFuture),
    /// Either all messages are stored or none.
    Batch(&'a [Outgoing<'a>], PublishAckFuture),
}

/// Sends the rows and waits for the PubAcks. A row that cannot be sent does not delay the others.
pub(crate) async fn publish(broker: &Broker, rows: &[Pending]) -> Result<Sent, Injected> {
    // All messages of an atomic batch must belong to one stream.
    let mut by_stream: BTreeMap<&str, Vec<Outgoing<'_>>> = BTreeMap::new();
    for row in rows {
        let stream = row.headers.get(header::EXPECTED_STREAM);
        let messages = by_stream.entry(stream.unwrap_or_default()).or_default();
        let headers = message_headers(row);
        messages.push(Outgoing { row, headers });
    }
    let mut sent = Sent {
        connection_number: broker.connection_number(),
        ..Sent::default()
    };
    let mut in_flight = Vec::new();
    for messages in by_stream.values() {
        match send_batch(broker, messages).await {
            Some(answer) => in_flight.push(InFlight::Batch(messages, answer)),
            None => send_each(broker, messages, &mut in_flight, &mut sent).await,
        }
    }
    failpoint!("relay.after_send")?;
    let refused = await_acks(in_flight, &mut sent).await;
    // The broker refuses a batch as a whole if it contains a duplicate, and does not say which
    // message that is.
    let mut again = Vec::new();
    for messages in refused {
        send_each(broker, messages, &mut again, &mut sent).await;
    }
    await_acks(again, &mut sent).await;
    Ok(sent)
}

/// Sends all messages as one atomic batch if there are enough. The last message commits the batch
/// and is acknowledged.
async fn send_batch(broker: &Broker, messages: &[Outgoing<'_>]) -> Option<PublishAckFuture> {
    let payload_max = broker.client().server_info().max_payload;
    let fits =
        |one: &Outgoing<'_>| one.row.payload.len() + one.row.headers.len() + OVERHEAD < payload_max;
    if messages.len() < ATOMIC_MIN || !messages.iter().all(fits) {
        return None;
    }
    let batch_id = Uuid::new_v4().to_string();
    let (last, others) = messages.split_last()?;
    let in_batch = |one: &Outgoing<'_>, number: usize| {
        let mut headers = one.headers.clone();
        headers.insert(nats_header::NATS_BATCH_ID, batch_id.as_str());
        headers.insert(nats_header::NATS_BATCH_SEQUENCE, number.to_string());
        headers
    };
    for (index, one) in others.iter().enumerate() {
        let payload = one.row.payload.clone().into();
        let headers = in_batch(one, index + 1);
        if let Err(error) = broker
            .client()
            .publish_with_headers(one.row.subject.clone(), headers, payload)
            .await
        {
            // The broker drops a batch that is never committed.
            debug!(error = %error, "A batch could not be sent; sending its messages singly");
            return None;
        }
    }
    let mut headers = in_batch(last, messages.len());
    headers.insert(
        nats_header::NATS_BATCH_COMMIT,
        nats_header::NATS_BATCH_COMMIT_FINAL,
    );
    send(broker, last.row, headers).await.ok()
}

async fn send_each<'a>(
    broker: &Broker,
    messages: &'a [Outgoing<'a>],
    in_flight: &mut Vec<InFlight<'a>>,
    sent: &mut Sent,
) {
    for one in messages {
        match send(broker, one.row, one.headers.clone()).await {
            Ok(answer) => in_flight.push(InFlight::One(one, answer)),
            Err(error) => sent.fail(std::slice::from_ref(one), error),
        }
    }
}

async fn send(
    broker: &Broker,
    row: &Pending,
    headers: HeaderMap,
) -> Result<PublishAckFuture, PublishError> {
    let message = PublishMessage::build()
        .payload(row.payload.clone().into())
        .headers(headers);
    broker
        .jetstream()
        .send_publish(row.subject.clone(), message)
        .await
}

/// Waits for all PubAcks. Returns the batches that the broker refused.
async fn await_acks<'a>(in_flight: Vec<InFlight<'a>>, sent: &mut Sent) -> Vec<&'a [Outgoing<'a>]> {
    let answers = join_all(in_flight.into_iter().map(async |one| match one {
        InFlight::One(message, answer) => (std::slice::from_ref(message), answer.await, false),
        InFlight::Batch(messages, answer) => (messages, answer.await, true),
    }));
    let mut refused = Vec::new();
    for (messages, answer, is_batch) in answers.await {
        match answer {
            // It is unknown whether the whole batch is stored.
            Ok(ack)
                if is_batch
                    && ack
                        .batch_size
                        .is_some_and(|size| size != messages.len() as u64) =>
            {
                debug!(
                    messages = messages.len(),
                    stored = ack.batch_size,
                    "The PubAck does not match the batch; sending its messages singly"
                );
                refused.push(messages);
            }
            // A duplicate is already stored; only its PubAck was lost. This counts as acknowledged.
            Ok(ack) => {
                // The messages of a batch have consecutive sequences, and the PubAck has the last
                // one.
                for (behind, one) in messages.iter().rev().enumerate() {
                    sent.acknowledge(one, ack.sequence.saturating_sub(behind as u64));
                }
            }
            // Nothing of the batch is stored. After a timeout, sending the rows singly would only
            // add load.
            Err(error) if is_batch && !is_no_answer(&error) => {
                debug!(messages = messages.len(), error = %error, "The broker refused a batch; sending its messages singly");
                refused.push(messages);
            }
            Err(error) => {
                sent.fail(messages, error);
            }
        }
    }
    refused
}

fn is_no_answer(error: &PublishError) -> bool {
    matches!(
        error.kind(),
        PublishErrorKind::TimedOut
            | PublishErrorKind::BrokenPipe
            | PublishErrorKind::StreamNotFound
    )
}

impl Sent {
    fn acknowledge(&mut self, one: &Outgoing<'_>, sequence: u64) {
        let stream_sequence = i64::try_from(sequence).unwrap_or(i64::MAX);
        self.acknowledged.push(Acknowledged {
            event_id: one.row.event_id,
            n: one.row.n,
            stream_sequence,
            at: Instant::now(),
            connection_number: self.connection_number,
        });
    }

    fn fail(&mut self, messages: &[Outgoing<'_>], error: PublishError) {
        self.stream_missing |= error.kind() == PublishErrorKind::StreamNotFound;
        self.unacknowledged
            .extend(messages.iter().map(|one| (one.row.event_id, one.row.n)));
        self.error.get_or_insert(error);
    }
}

/// The stored headers, plus those derived from the row's key.
pub(crate) fn message_headers(row: &Pending) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(header::SPEC_VERSION, SPEC_VERSION);
    headers.insert(header::ID, row.event_id.to_string());
    headers.insert(header::MESSAGE_ID, row.message_id());
    for (name, value) in row.headers.iter() {
        // Checked, because the client panics on an invalid header, and the row may have been edited
        // by hand.
        match (HeaderName::from_str(name), HeaderValue::from_str(value)) {
            (Ok(name), Ok(value)) => headers.insert(name, value),
            _ => {
                error!(event.id = %row.event_id, header = name, "Outbox row with an invalid header; header omitted")
            }
        }
    }
    headers
}

#[cfg(test)]
pub(crate) mod tests {
    use serde::{Deserialize, Serialize};
    use shared_contracts::{Event, EventId, header};
    use time::OffsetDateTime;
    use uuid::Uuid;

    use super::*;
    use crate::Message;

    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    struct Asked {
        key: Uuid,
    }

    impl Event for Asked {
        const SUBJECT: &'static str = "test.asked";
        const STREAM: &'static str = "TEST";
        const TYPE: &'static str = "test.asked.v1";
        const SOURCE: &'static str = "test";

        fn key(&self) -> Uuid {
            self.key
        }
    }

    pub(crate) fn pending(n: u32) -> Pending {
        let event_id: EventId = "01933f3c-7d5a-7b60-9d6f-000000000001".parse().unwrap();
        let key = "01933f3c-7d5a-7b60-9d6f-3f0b4b1f2a11".parse().unwrap();
        Message::again(
            event_id,
            n,
            &Asked { key },
            OffsetDateTime::UNIX_EPOCH,
            None,
        )
        .into()
    }

    #[test]
    fn a_re_ask_has_a_message_id_of_its_own_and_its_number_in_a_header() {
        assert_eq!(
            pending(0).message_id(),
            "01933f3c-7d5a-7b60-9d6f-000000000001"
        );
        assert_eq!(pending(0).headers.get(header::ASK), None);
        assert_eq!(
            pending(3).message_id(),
            "01933f3c-7d5a-7b60-9d6f-000000000001.r3"
        );
        assert_eq!(pending(3).headers.get(header::ASK), Some("3"));
    }
}
