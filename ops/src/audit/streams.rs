//! Compares each message in the streams with its order or decision. These rows keep the ids of
//! their events for ever, so pruning the outbox does not matter.
//!
//! A message is published after its row is committed, so a row that is read after its message must
//! exist. Messages may repeat and may be missing: the broker is a cache.

use std::collections::{BTreeMap, HashSet};
use std::mem;
use std::time::Duration;

use anyhow::{Context as _, bail};
use async_nats::jetstream::consumer::{DeliverPolicy, pull};
use async_nats::jetstream::context::GetStreamErrorKind;
use async_nats::jetstream::{self, ErrorCode, Message};
use futures_util::StreamExt as _;
use messaging::{Subscriber as _, Subscription, message_key, read_message};
use orders::Settle;
use payments::Charge;
use sea_orm::{DatabaseConnection, DbErr, FromQueryResult};
use shared_contracts::{
    Amount, DeclineReason, Event, OrderCancelled, OrderFinished, OrderPlaced, PaymentSettled,
    UserId,
};
use uuid::Uuid;

use super::{Databases, FINDINGS_MAX, Finding, FindingKind, Report, TRUNCATED_ID, rows};

/// Messages compared per query. Memory use does not grow with the stream.
const BATCH_MAX: usize = 5000;
/// Time limit for reading one batch.
const READ_TIMEOUT: Duration = Duration::from_secs(20);

/// What a message states about an order.
struct Claim {
    /// Stream and sequence.
    position: String,
    subject: &'static str,
    order_id: Uuid,
    event_id: Uuid,
    user_id: String,
    amount: i64,
    end: Option<FinalState>,
}

/// Outcome of the payment or status of the order, and the reason.
type FinalState = (&'static str, Option<&'static str>);

/// A claim that differs from its row. All columns of the row are `None` if there is none.
#[derive(FromQueryResult)]
struct Mismatch {
    /// Index of the claim.
    number: i32,
    user_id: Option<String>,
    amount: Option<i64>,
    end: Option<String>,
    reason: Option<String>,
    event_id: Option<Uuid>,
}

/// Claims that differ from their rows; `{}` is the query for the rows.
const MISMATCHES: &str = "
    SELECT claim.number, found.user_id, found.amount, found.\"end\", found.reason, found.event_id
    FROM unnest($1::integer[], $2::uuid[], $3::uuid[], $4::text[], $5::bigint[], $6::text[], $7::text[])
        AS claim (number, order_id, event_id, user_id, amount, \"end\", reason)
    LEFT JOIN ({}) found USING (order_id)
    WHERE (claim.event_id, claim.user_id, claim.amount) IS DISTINCT FROM (found.event_id, found.user_id, found.amount)
       OR (claim.\"end\" <> '' AND (claim.\"end\", claim.reason) IS DISTINCT FROM (found.\"end\", coalesce(found.reason, '')))
    ORDER BY claim.number";
const PLACED: &str = "SELECT id AS order_id, placed_event_id AS event_id, user_id, amount, status AS \"end\", reason FROM orders";
const ENDED: &str = "SELECT id AS order_id, final_event_id AS event_id, user_id, amount, status AS \"end\", reason FROM orders";
const DECIDED: &str =
    "SELECT order_id, event_id, user_id, amount, outcome AS \"end\", reason FROM payments";

/// Keys of messages that are or were dead letters. If an operator has dropped a dead letter, its
/// event on `gozon.dlq.*` still has the key.
const WITH_DEAD_LETTER: &str = "
    SELECT message_key FROM dead_letters WHERE consumer = $1 AND message_key = ANY($2::text[])
    UNION SELECT message_key FROM (
        SELECT coalesce(payload::json->>'message_key', payload::json->>'event_id') AS message_key
        FROM (SELECT payload FROM outbox WHERE subject = $3 OFFSET 0) copies
    ) copied WHERE message_key = ANY($2::text[])";

/// The rows that the messages of a subject are made from, and the subscription that reads them.
struct Source<'a> {
    db: &'a DatabaseConnection,
    rows: &'static str,
    reader: Option<(&'a DatabaseConnection, &'static Subscription)>,
}

/// A message that looks wrong, and the key that its dead letter would have.
struct Suspect {
    finding: Finding,
    key: String,
}

/// Adds findings to the report. If a stream cannot be read, the report says so; that is no error.
pub(super) async fn check(
    databases: &Databases,
    jetstream: &jetstream::Context,
    report: &mut Report,
) -> Result<(), DbErr> {
    let mut found = StreamFindings::default();
    for stream in [OrderPlaced::STREAM, PaymentSettled::STREAM] {
        if let Err(error) = check_stream(databases, jetstream, stream, &mut found, report).await {
            match error.downcast::<DbErr>() {
                Ok(error) => return Err(error),
                Err(error) => report
                    .not_looked_at
                    .push(format!("stream {stream}: {error:#}")),
            }
        }
    }
    report.findings.extend(found.into_findings());
    Ok(())
}

async fn check_stream(
    databases: &Databases,
    jetstream: &jetstream::Context,
    name: &str,
    found: &mut StreamFindings,
    report: &mut Report,
) -> anyhow::Result<()> {
    let Some(mut reading) = StreamReader::begin(jetstream, name).await? else {
        return Ok(());
    };
    loop {
        let messages = reading.next().await?;
        if messages.is_empty() {
            return Ok(());
        }
        report.messages += messages.len() as u64;
        compare(databases, name, &messages, found).await?;
    }
}

/// Reads a stream from its first message to the message that was last when reading began.
struct StreamReader {
    messages: pull::Ordered,
    end: u64,
    ended: bool,
}

impl StreamReader {
    /// `None` if the stream is empty.
    async fn begin(jetstream: &jetstream::Context, name: &str) -> anyhow::Result<Option<Self>> {
        let stream = match jetstream.get_stream(name).await {
            Ok(stream) => stream,
            Err(error) => match error.kind() {
                GetStreamErrorKind::JetStream(error)
                    if error.error_code() == ErrorCode::STREAM_NOT_FOUND =>
                {
                    bail!("it does not exist")
                }
                _ => return Err(anyhow::Error::new(error).context("its state cannot be read")),
            },
        };
        let state = &stream.cached_info().state;
        if state.messages == 0 {
            return Ok(None);
        }
        let end = state.last_sequence;
        // An ephemeral consumer: the broker deletes it soon after this process ends.
        let config = pull::OrderedConfig {
            deliver_policy: DeliverPolicy::All,
            ..Default::default()
        };
        let consumer = stream
            .create_consumer(config)
            .await
            .context("it cannot be read")?;
        let messages = consumer.messages().await.context("it cannot be read")?;
        Ok(Some(Self {
            messages,
            end,
            ended: false,
        }))
    }

    /// The next batch; empty at the end.
    async fn next(&mut self) -> anyhow::Result<Vec<Message>> {
        let mut messages = Vec::new();
        let read = async {
            while !self.ended && messages.len() < BATCH_MAX {
                let message = self
                    .messages
                    .next()
                    .await
                    .context("reading ended early")?
                    .context("it cannot be read")?;
                let info = message.info().map_err(anyhow::Error::from_boxed)?;
                // A message beyond the end also ends the reading: the ones before may be evicted.
                self.ended = info.stream_sequence >= self.end || info.pending == 0;
                messages.push(message);
            }
            anyhow::Ok(())
        };
        tokio::time::timeout(READ_TIMEOUT, read)
            .await
            .with_context(|| format!("a batch was not read within {READ_TIMEOUT:?}"))??;
        Ok(messages)
    }
}

async fn compare(
    databases: &Databases,
    stream: &str,
    messages: &[Message],
    found: &mut StreamFindings,
) -> anyhow::Result<()> {
    let mut by_subject: BTreeMap<&'static str, (Vec<Claim>, Vec<Suspect>)> = BTreeMap::new();
    for message in messages {
        let Some((subject, read)) = read(stream, message) else {
            continue;
        };
        let (claim, suspects) = by_subject.entry(subject).or_default();
        match read {
            Ok(one) => claim.push(one),
            Err(suspect) => suspects.push(suspect),
        }
    }
    for (subject, (claim, mut suspects)) in by_subject {
        let source = source(databases, subject);
        suspects.extend(mismatches(&source, &claim).await?.iter().filter_map(|row| {
            let claim = claim.get(usize::try_from(row.number).ok()?)?;
            Some(Suspect {
                finding: contradiction(claim, row)?,
                key: claim.event_id.to_string(),
            })
        }));
        let with_dead_letter = with_dead_letter(&source, &suspects).await?;
        suspects.retain(|suspect| !with_dead_letter.contains(&suspect.key));
        found.add(suspects.into_iter().map(|suspect| suspect.finding));
    }
    Ok(())
}

/// The database compares, so a healthy system returns no rows.
async fn mismatches(source: &Source<'_>, claim: &[Claim]) -> Result<Vec<Mismatch>, DbErr> {
    let end = |one: &Claim| one.end.unwrap_or_default();
    let values = vec![
        (0..claim.len())
            .filter_map(|number| i32::try_from(number).ok())
            .collect::<Vec<i32>>()
            .into(),
        claim
            .iter()
            .map(|one| one.order_id)
            .collect::<Vec<Uuid>>()
            .into(),
        claim
            .iter()
            .map(|one| one.event_id)
            .collect::<Vec<Uuid>>()
            .into(),
        claim
            .iter()
            .map(|one| one.user_id.clone())
            .collect::<Vec<String>>()
            .into(),
        claim
            .iter()
            .map(|one| one.amount)
            .collect::<Vec<i64>>()
            .into(),
        claim
            .iter()
            .map(|one| end(one).0.to_owned())
            .collect::<Vec<String>>()
            .into(),
        claim
            .iter()
            .map(|one| end(one).1.unwrap_or_default().to_owned())
            .collect::<Vec<String>>()
            .into(),
    ];
    rows(source.db, &MISMATCHES.replace("{}", source.rows), values).await
}

fn source<'a>(databases: &'a Databases, subject: &str) -> Source<'a> {
    let (orders, payments) = (&databases.orders, &databases.payments);
    match subject {
        OrderPlaced::SUBJECT => Source {
            db: orders,
            rows: PLACED,
            reader: Some((payments, &Charge::SUBSCRIPTION)),
        },
        PaymentSettled::SUBJECT => Source {
            db: payments,
            rows: DECIDED,
            reader: Some((orders, &Settle::SUBSCRIPTION)),
        },
        // Only gateways read these, and they write no dead letters.
        _ => Source {
            db: orders,
            rows: ENDED,
            reader: None,
        },
    }
}

/// `None` if this version does not know the subject.
fn read(stream: &str, message: &Message) -> Option<(&'static str, Result<Claim, Suspect>)> {
    let subject = message.subject.as_str();
    Some(match subject {
        OrderPlaced::SUBJECT => (
            OrderPlaced::SUBJECT,
            read_as(stream, message, |event: OrderPlaced| {
                (event.user_id, event.amount, None)
            }),
        ),
        PaymentSettled::SUBJECT => {
            let claims = |event: PaymentSettled| {
                let reason = event.outcome.reason().map(DeclineReason::as_str);
                (
                    event.user_id,
                    event.amount,
                    Some((event.outcome.as_str(), reason)),
                )
            };
            (PaymentSettled::SUBJECT, read_as(stream, message, claims))
        }
        OrderFinished::SUBJECT => {
            let claims =
                |event: OrderFinished| (event.user_id, event.amount, Some(("FINISHED", None)));
            (OrderFinished::SUBJECT, read_as(stream, message, claims))
        }
        OrderCancelled::SUBJECT => {
            let claims = |event: OrderCancelled| {
                (
                    event.user_id,
                    event.amount,
                    Some(("CANCELLED", Some(event.reason.as_str()))),
                )
            };
            (OrderCancelled::SUBJECT, read_as(stream, message, claims))
        }
        _ => return None,
    })
}

fn read_as<E: Event>(
    stream: &str,
    message: &Message,
    claims: impl FnOnce(E) -> (UserId, Amount, Option<FinalState>),
) -> Result<Claim, Suspect> {
    let position = format!(
        "{stream} {}",
        message.info().map_or(0, |info| info.stream_sequence)
    );
    let received =
        read_message::<E>(message.headers.as_ref(), &message.payload).map_err(|cause| Suspect {
            finding: Finding {
                kind: FindingKind::UnreadableMessage,
                id: position.clone(),
                detail: format!("{}: {cause}", E::SUBJECT),
            },
            key: message_key(&message.subject, message.headers.as_ref(), &message.payload),
        })?;
    let order_id = received.event.key();
    let (user_id, amount, end) = claims(received.event);
    Ok(Claim {
        position,
        subject: E::SUBJECT,
        order_id,
        event_id: received.event_id.as_uuid(),
        user_id: user_id.to_string(),
        amount: amount.minor_units(),
        end,
    })
}

/// Describes how a claim differs from its row.
fn contradiction(claim: &Claim, row: &Mismatch) -> Option<Finding> {
    let Claim {
        position, subject, ..
    } = claim;
    let finding = |kind, id: Uuid, detail| {
        Some(Finding {
            kind,
            id: id.to_string(),
            detail: format!("{position}, {subject}: {detail}"),
        })
    };
    let false_about = |detail| finding(FindingKind::FalseMessage, claim.order_id, detail);
    let (Some(user_id), Some(amount), Some(row_end)) = (&row.user_id, row.amount, &row.end) else {
        let nothing = match claim.subject {
            PaymentSettled::SUBJECT => "the order has no decision",
            _ => "the order does not exist",
        };
        return false_about(nothing.to_owned());
    };
    if (&claim.user_id, claim.amount) != (user_id, amount) {
        return false_about(format!(
            "message: amount {} of {}; row: amount {amount} of {user_id}",
            claim.amount, claim.user_id
        ));
    }
    if let Some((end, reason)) = claim.end
        && (end, reason) != (row_end.as_str(), row.reason.as_deref())
    {
        let words = |end: &str, reason: Option<&str>| {
            [Some(end), reason]
                .into_iter()
                .flatten()
                .collect::<Vec<_>>()
                .join(", ")
        };
        return false_about(format!(
            "message: {}; row: {}",
            words(end, reason),
            words(row_end, row.reason.as_deref())
        ));
    }
    // Rows written before event ids were stored have none.
    match row.event_id {
        Some(event_id) if event_id != claim.event_id => finding(
            FindingKind::ForeignMessage,
            claim.event_id,
            format!("the event of order {} has id {event_id}", claim.order_id),
        ),
        _ => None,
    }
}

/// Keys of suspects that are dead letters, which `flow` reports, or that an operator has dropped.
async fn with_dead_letter(
    source: &Source<'_>,
    suspects: &[Suspect],
) -> Result<HashSet<String>, DbErr> {
    #[derive(FromQueryResult)]
    struct Key {
        message_key: String,
    }
    let Some((db, subscription)) = source.reader.filter(|_| !suspects.is_empty()) else {
        return Ok(HashSet::new());
    };
    let keys: Vec<String> = suspects.iter().map(|suspect| suspect.key.clone()).collect();
    let values = vec![
        subscription.consumer.into(),
        keys.into(),
        format!("gozon.dlq.{}", subscription.service).into(),
    ];
    let found: Vec<Key> = rows(db, WITH_DEAD_LETTER, values).await?;
    Ok(found.into_iter().map(|key| key.message_key).collect())
}

/// Findings without repetitions, however often a stream repeats a message.
#[derive(Default)]
struct StreamFindings(BTreeMap<FindingKind, BTreeMap<String, Finding>>);

impl StreamFindings {
    fn add(&mut self, findings: impl Iterator<Item = Finding>) {
        for finding in findings {
            let of_kind = self.0.entry(finding.kind).or_default();
            // In stream order, so that a second pass returns the same findings.
            if of_kind.len() <= FINDINGS_MAX {
                of_kind.entry(finding.id.clone()).or_insert(finding);
            }
        }
    }

    fn into_findings(self) -> impl Iterator<Item = Finding> {
        self.0.into_iter().flat_map(|(kind, mut of_kind)| {
            let mut findings: Vec<Finding> = mem::take(&mut of_kind).into_values().collect();
            if findings.len() > FINDINGS_MAX {
                findings.truncate(FINDINGS_MAX);
                let detail = format!("only the first {FINDINGS_MAX} are listed");
                findings.push(Finding {
                    kind,
                    id: TRUNCATED_ID.to_owned(),
                    detail,
                });
            }
            findings
        })
    }
}
