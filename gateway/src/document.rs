//! The OpenAPI document of the whole API: the documents of the services, merged with the gateway's own operations.

use std::sync::LazyLock;

use service_kit::openapi::complete;
use utoipa::openapi::{InfoBuilder, LicenseBuilder, OpenApi, Server};

use crate::{events, ops, problems};

/// Each service keeps its document in its folder, and a test compares it with the code. Compiled in, so that the gateway
/// serves the documents while the services are down.
const ORDERS: &str = include_str!("../../orders/openapi.json");
const PAYMENTS: &str = include_str!("../../payments/openapi.json");

/// A service's document without the paths that the gateway does not forward: it has operator paths of its own, and it
/// serves no half of a timeline.
fn forwarded(text: &str) -> OpenApi {
    let mut document: OpenApi = serde_json::from_str(text)
        .expect("the documents in this repository are OpenAPI; a test reads them");
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

/// Adds the errors that the gateway may return for any operation, and removes components that no path refers to.
fn finished(mut document: OpenApi) -> OpenApi {
    complete(&mut document, true, &[]);
    forget_what_nothing_names(&mut document);
    document
}

/// The whole API in one document: accounts first, as a newcomer needs them.
pub fn all() -> OpenApi {
    let mut all = forwarded(PAYMENTS);
    all.merge(forwarded(ORDERS));
    all.merge(events::api().into_openapi());
    all.merge(ops::api().into_openapi());
    all.merge(problems::api().into_openapi());
    all.info = InfoBuilder::new()
        .title("Gozon")
        .version(env!("CARGO_PKG_VERSION"))
        .license(Some(LicenseBuilder::new().name("MIT OR Apache-2.0").identifier(Some("MIT OR Apache-2.0")).build()))
        .description(Some(
            "Orders that are paid exactly once, whatever crashes. Amounts are integers of minor units. Every error is a problem \
             document (RFC 9457). Send an Idempotency-Key with every POST: repeated with the same key, it is done once.\n\n\
             To try it, open an account, put money into it, and place an order: the examples do so for alice.",
        ))
        .build();
    all.servers = Some(vec![Server::new("/")]);
    finished(all)
}

fn forget_what_nothing_names(document: &mut OpenApi) {
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
