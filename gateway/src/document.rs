//! The OpenAPI document of the whole API: the services' documents, merged with the gateway's own
//! operations.

use std::sync::LazyLock;

use service_kit::openapi::complete;
use utoipa::openapi::{InfoBuilder, LicenseBuilder, OpenApi, Server};

use crate::{events, ops, problems};

/// The services' documents; a test in each service compares them with its code. They are compiled
/// in, so that the gateway can serve them while the services are down.
const ORDERS: &str = include_str!("../../orders/openapi.json");
const PAYMENTS: &str = include_str!("../../payments/openapi.json");

/// A service's document, without the paths that the gateway does not forward: its own operator
/// paths replace those of the services, and it merges the two halves of a timeline.
fn forwarded(text: &str) -> OpenApi {
    let mut document: OpenApi = serde_json::from_str(text)
        .expect("the documents in this repository are valid; a test parses them");
    document
        .paths
        .paths
        .retain(|path, _| !path.starts_with("/v1/ops/") && !path.starts_with("/v1/payments/"));
    document
}

pub(crate) fn orders() -> OpenApi {
    finished(forwarded(ORDERS))
}

pub(crate) fn payments() -> OpenApi {
    finished(forwarded(PAYMENTS))
}

/// Adds the errors that the gateway may return for any operation, and removes components that no
/// path refers to.
fn finished(mut document: OpenApi) -> OpenApi {
    complete(&mut document, true, &[]);
    remove_unused_components(&mut document);
    document
}

/// The whole API in one document. Accounts come first, because a new user needs one first.
pub fn all() -> OpenApi {
    let mut all = forwarded(PAYMENTS);
    all.merge(forwarded(ORDERS));
    all.merge(events::api().into_openapi());
    all.merge(ops::api().into_openapi());
    all.merge(problems::api().into_openapi());
    all.info = InfoBuilder::new()
        .title("Gozon")
        .version(env!("CARGO_PKG_VERSION"))
        .license(Some(
            LicenseBuilder::new()
                .name("MIT OR Apache-2.0")
                .identifier(Some("MIT OR Apache-2.0"))
                .build(),
        ))
        .description(Some(
            "Orders that are paid exactly once, whatever crashes. Amounts are integers in minor \
             units. Every error is a problem document (RFC 9457). Send an Idempotency-Key with \
             every POST: a retry with the same key is not executed again.\n\n\
             To try it, open an account, deposit money and place an order. The examples do this \
             for alice.",
        ))
        .build();
    all.servers = Some(vec![Server::new("/")]);
    finished(all)
}

fn remove_unused_components(document: &mut OpenApi) {
    let items = document.paths.paths.values();
    let operations = items.flat_map(|item| [&item.get, &item.post]).flatten();
    let used: Vec<String> = operations
        .filter_map(|operation| operation.tags.clone())
        .flatten()
        .collect();
    document
        .tags
        .iter_mut()
        .for_each(|tags| tags.retain(|tag| used.contains(&tag.name)));
    loop {
        let text = document.to_json().expect("a document is JSON");
        let Some(components) = &mut document.components else {
            return;
        };
        let before = components.schemas.len();
        components
            .schemas
            .retain(|name, _| text.contains(&format!("\"#/components/schemas/{name}\"")));
        if components.schemas.len() == before {
            return;
        }
    }
}

pub(crate) fn yaml() -> &'static str {
    static YAML: LazyLock<String> = LazyLock::new(|| {
        all()
            .to_yaml()
            .expect("a document that is JSON is YAML too")
    });
    &YAML
}
