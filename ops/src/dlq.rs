//! Dead letters of both services: what they are, what sending them again would do, and sending them again.
//!
//! A replay is the same fact under a message id that the broker has never seen. Readers recognise facts, so a replay of
//! what was applied meanwhile changes nothing.

use anyhow::{Context as _, ensure};
use async_nats::jetstream::{self, message::PublishMessage};
use messaging::consumer::{self, Received};
use messaging::dead_letter::{self, Model};
use orders::entity::order;
use payments::entity::{account, payment};
use sea_orm::{EntityTrait as _, QueryOrder as _};
use serde::Serialize;
use shared_contracts::{DeclineReason, OrderPlaced, PaymentSettled};
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use crate::audit::Databases;

/// A dead letter, as it is shown.
#[derive(Clone, Debug, Serialize)]
pub struct Letter {
    /// Its own id.
    pub id: Uuid,
    /// `orders` or `payments`: whose table it is in.
    pub service: &'static str,
    /// `poison` or `quarantine`.
    pub kind: String,
    /// Why it was not applied.
    pub cause: String,
    /// The fact, if the message says which.
    pub event_id: Option<Uuid>,
    /// The order, if the message says which.
    pub order_id: Option<Uuid>,
    /// Where it was published.
    pub subject: String,
    /// How often it came.
    pub times: i32,
    /// When it first came, RFC 3339.
    pub created_at: String,
    /// How often it was sent again.
    pub replays: i32,
    /// Whether it waits for a person.
    pub waits: bool,
    /// As received.
    pub headers: String,
    /// As received.
    pub payload: String,
    #[serde(skip)]
    row: Model,
}

impl Letter {
    fn new(service: &'static str, row: Model) -> Self {
        Self {
            id: row.id,
            service,
            kind: row.kind.clone(),
            cause: row.cause.clone(),
            event_id: row.event_id,
            order_id: row.order_id,
            subject: row.subject.clone(),
            times: row.times,
            created_at: row.created_at.format(&Rfc3339).unwrap_or_default(),
            replays: row.replays,
            waits: row.waits(),
            headers: String::from_utf8_lossy(&row.headers).into_owned(),
            payload: String::from_utf8_lossy(&row.payload).into_owned(),
            row,
        }
    }
}

/// All dead letters, the oldest first.
pub async fn list(databases: &Databases) -> anyhow::Result<Vec<Letter>> {
    let mut letters = Vec::new();
    for (service, db) in [
        ("orders", &databases.orders),
        ("payments", &databases.payments),
    ] {
        let rows = dead_letter::Entity::find()
            .order_by_asc(dead_letter::Column::Id)
            .all(db)
            .await?;
        letters.extend(rows.into_iter().map(|row| Letter::new(service, row)));
    }
    Ok(letters)
}

/// The dead letter with this id.
pub async fn find(databases: &Databases, id: Uuid) -> anyhow::Result<Letter> {
    let letter = list(databases)
        .await?
        .into_iter()
        .find(|letter| letter.id == id);
    letter.with_context(|| format!("there is no dead letter {id}: gozon dlq ls shows them"))
}

/// What sending it again would do right now, in words.
pub async fn foresee(databases: &Databases, letter: &Letter) -> anyhow::Result<String> {
    let (headers, payload) = letter.row.message();
    match letter.service {
        "payments" => match consumer::read::<OrderPlaced>(Some(&headers), &payload) {
            Err(cause) => Ok(format!("would be poison again: {cause}")),
            Ok(received) => foresee_charge(databases, &received).await,
        },
        _ => match consumer::read::<PaymentSettled>(Some(&headers), &payload) {
            Err(cause) => Ok(format!("would be poison again: {cause}")),
            Ok(received) => foresee_settlement(databases, &received.event).await,
        },
    }
}

async fn foresee_charge(
    databases: &Databases,
    received: &Received<OrderPlaced>,
) -> anyhow::Result<String> {
    let event = &received.event;
    let decided = payment::Entity::find_by_id(event.order_id.as_uuid())
        .one(&databases.payments)
        .await?;
    if let Some(decision) = decided {
        let same = decision.user_id == event.user_id.as_str()
            && decision.amount == event.amount.minor_units();
        let asks = i64::from(received.ask) > i64::from(decision.last_ask);
        return Ok(match same {
            true if asks => format!(
                "would give the answer again: the order is decided as {}",
                decision.outcome
            ),
            true => format!(
                "would change nothing: the order is decided as {}",
                decision.outcome
            ),
            false => "would be quarantined again: the order is decided with another user or amount"
                .to_owned(),
        });
    }
    let balance = account::Entity::find_by_id(event.user_id.to_string())
        .one(&databases.payments)
        .await?
        .map(|account| account.balance);
    let amount = event.amount.minor_units();
    Ok(match balance {
        None => "would decline the order: no_account".to_owned(),
        Some(balance) if balance < amount => {
            format!("would decline the order: insufficient_funds ({amount} of {balance})")
        }
        Some(balance) => format!("would debit {amount} of {balance} from {}", event.user_id),
    })
}

async fn foresee_settlement(
    databases: &Databases,
    event: &PaymentSettled,
) -> anyhow::Result<String> {
    let Some(order) = order::Entity::find_by_id(event.order_id.as_uuid())
        .one(&databases.orders)
        .await?
    else {
        return Ok("would be quarantined again: there is no such order".to_owned());
    };
    if order.user_id != event.user_id.as_str() || order.amount != event.amount.minor_units() {
        return Ok("would be quarantined again: the order has another user or amount".to_owned());
    }
    let reason = event.outcome.reason().map(DeclineReason::as_str);
    let (status, end) = match event.outcome.reason() {
        None => (order::Status::Finished, "FINISHED"),
        Some(_) => (order::Status::Cancelled, "CANCELLED"),
    };
    Ok(match order.status {
        order::Status::New => format!("would end the order: {end}"),
        ended if ended == status && order.reason.as_deref() == reason => {
            format!("would change nothing: the order is {end}")
        }
        _ => "would be quarantined again: the order has ended otherwise".to_owned(),
    })
}

/// Sends it again and waits until the broker has it.
pub async fn replay(
    databases: &Databases,
    jetstream: &jetstream::Context,
    letter: &Letter,
) -> anyhow::Result<()> {
    let db = if letter.service == "orders" {
        &databases.orders
    } else {
        &databases.payments
    };
    let begun_at = dead_letter::clock(db).await?;
    let (headers, payload) = letter.row.message();
    let message = PublishMessage::build()
        .headers(headers)
        .payload(payload.into());
    let published = jetstream
        .send_publish(letter.subject.clone(), message)
        .await?
        .await;
    let ack = published
        .with_context(|| format!("dead letter {} was not taken by the broker", letter.id))?;
    ensure!(
        !ack.duplicate,
        "the broker took dead letter {} for a repetition, under an id made for it",
        letter.id
    );
    dead_letter::note_replay(db, letter.id, begun_at).await?;
    Ok(())
}

/// Takes it away for good.
pub async fn remove(databases: &Databases, letter: &Letter) -> anyhow::Result<()> {
    let db = if letter.service == "orders" {
        &databases.orders
    } else {
        &databases.payments
    };
    dead_letter::Entity::delete_by_id(letter.id)
        .exec(db)
        .await?;
    Ok(())
}
