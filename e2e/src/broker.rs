//! The operator's access to the broker.

use anyhow::Context as _;
use async_nats::HeaderMap;
use async_nats::jetstream::context::PublishAckFuture;
use broker::{Broker, BrokerConfig};
use stack::System;
use std::future::IntoFuture as _;
use uuid::Uuid;

pub async fn operator(system: &System) -> anyhow::Result<Broker> {
    let password = system.folder().secrets.nats_ops.clone();
    let config = BrokerConfig {
        url: system.nats().url(),
        user: "ops".to_owned(),
        password: password.into(),
        name: "test".to_owned(),
    };
    let broker = Broker::connect(config).await?;
    broker.until_connected().await;
    Ok(broker)
}

/// Publishes the messages of a stream again under new message ids: the oldest ones, at most
/// `at_most`. Returns how many.
pub async fn replay_stream(broker: &Broker, stream: &str, at_most: u64) -> anyhow::Result<u64> {
    /// Acks in flight.
    const ACKS_MAX: usize = 50;
    let mut stream = broker.jetstream().get_stream(stream).await?;
    let state = stream.info().await?.state.clone();
    let end = state.last_sequence.min(
        state
            .first_sequence
            .saturating_add(at_most)
            .saturating_sub(1),
    );
    let mut acks: Vec<PublishAckFuture> = Vec::new();
    let mut published = 0;
    for sequence in state.first_sequence..=end {
        // Old messages may expire meanwhile.
        let Ok(message) = stream.direct_get(sequence).await else {
            continue;
        };
        let mut headers = HeaderMap::new();
        // Without headers for the broker: some of these messages were stored as batches.
        for (name, values) in message
            .headers
            .iter()
            .filter(|(name, _)| !name.to_string().starts_with("Nats-"))
        {
            headers.insert(
                name.clone(),
                values.first().context("a header has a value")?.clone(),
            );
        }
        headers.insert("Nats-Msg-Id", Uuid::new_v4().to_string());
        acks.push(
            broker
                .jetstream()
                .publish_with_headers(message.subject.clone(), headers, message.payload.clone())
                .await?,
        );
        published += 1;
        if acks.len() == ACKS_MAX {
            for ack in acks.drain(..) {
                anyhow::ensure!(
                    !ack.into_future().await?.duplicate,
                    "the broker treats a new message id as a duplicate"
                );
            }
        }
    }
    for ack in acks {
        anyhow::ensure!(
            !ack.into_future().await?.duplicate,
            "the broker treats a new message id as a duplicate"
        );
    }
    Ok(published)
}
