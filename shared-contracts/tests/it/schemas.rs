//! Documents for other languages, generated from the types: a JSON Schema for each event, and an
//! AsyncAPI document. They are committed, and these tests fail if they are outdated.

use std::path::PathBuf;

use serde_json::{Value, json};
use shared_contracts::{
    DLQ_STREAM, Event, OrderCancelled, OrderFinished, OrderPlaced, PaymentSettled, SPEC_VERSION,
    header,
};

const UPDATE: &str = "GOZON_UPDATE_SNAPSHOTS";

struct DescribedEvent {
    name: &'static str,
    subject: &'static str,
    stream: &'static str,
    kind: &'static str,
    source: &'static str,
    readers: &'static [&'static str],
    golden: &'static [&'static str],
    schema: Value,
}

fn describe<E: Event + schemars::JsonSchema>(
    readers: &'static [&'static str],
    golden: &'static [&'static str],
) -> DescribedEvent {
    // One schema without references, in the dialect that most tools support.
    let settings = schemars::generate::SchemaSettings::draft07()
        .with(|settings| settings.inline_subschemas = true);
    let mut schema = settings
        .into_generator()
        .into_root_schema_for::<E>()
        .to_value();
    schema["$id"] = Value::from(format!("urn:gozon:event:{}", E::TYPE));
    let name = schema["title"].as_str().unwrap().to_owned();
    DescribedEvent {
        name: String::leak(name),
        subject: E::SUBJECT,
        stream: E::STREAM,
        kind: E::TYPE,
        source: E::SOURCE,
        readers,
        golden,
        schema,
    }
}

fn events() -> [DescribedEvent; 4] {
    [
        describe::<OrderPlaced>(
            &["payments"],
            &[include_str!("../golden/gozon.order.placed.v1.json")],
        ),
        describe::<OrderFinished>(
            &[],
            &[include_str!("../golden/gozon.order.finished.v1.json")],
        ),
        describe::<OrderCancelled>(
            &[],
            &[include_str!("../golden/gozon.order.cancelled.v1.json")],
        ),
        describe::<PaymentSettled>(
            &["orders"],
            &[
                include_str!("../golden/gozon.payment.settled.v1.paid.json"),
                include_str!("../golden/gozon.payment.settled.v1.declined.json"),
            ],
        ),
    ]
}

fn headers(event: &DescribedEvent) -> Value {
    let text = |description: &str| json!({ "type": "string", "description": description });
    let id = |description: &str| json!({ "type": "string", "format": "uuid", "description": description });
    json!({
        "type": "object",
        "required": [header::SPEC_VERSION, header::ID, header::TYPE, header::SOURCE, header::TIME, header::SUBJECT, header::MESSAGE_ID],
        "properties": {
            header::SPEC_VERSION: { "type": "string", "const": SPEC_VERSION },
            header::ID: id("Event id, the same each time the event is published. Consumers recognise duplicates by it."),
            header::TYPE: { "type": "string", "const": event.kind },
            header::SOURCE: { "type": "string", "const": event.source },
            header::TIME: { "type": "string", "format": "date-time", "description": "When the event was created." },
            header::SUBJECT: id("The order that the event is about."),
            header::MESSAGE_ID: text("The broker's de-duplication id: the event id, followed by `.r<n>` for the n-th re-ask."),
            header::ASK: { "type": "string", "pattern": "^[0-9]+$", "description": "Number of the re-ask; absent on the first message." },
            header::EXPECTED_STREAM: { "type": "string", "const": event.stream },
            header::TRACEPARENT: text("W3C trace context."),
        }
    })
}

fn asyncapi(events: &[DescribedEvent]) -> Value {
    let mut document = json!({
        "asyncapi": "3.0.0",
        "info": {
            "title": "Gozon events",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Events between the services over NATS JetStream, as CloudEvents in binary mode: attributes are \
                            message headers, the body is plain JSON. Messages may be delivered more than once and in any order. \
                            Consumers must recognise duplicates by `ce-id` and tolerate unknown fields.",
            "license": { "name": "MIT OR Apache-2.0" }
        },
        "defaultContentType": "application/json",
        "servers": { "local": { "host": "127.0.0.1:4222", "protocol": "nats", "description": "The server that `./dev up` starts." } },
        "channels": {},
        "operations": {},
        "components": { "messages": {} }
    });
    for event in events {
        document["channels"][event.name] = json!({
            "address": event.subject,
            "description": format!("Stored by stream {}.", event.stream),
            "messages": { event.name: { "$ref": format!("#/components/messages/{}", event.name) } }
        });
        document["components"]["messages"][event.name] = json!({
            "name": event.kind,
            "title": event.name,
            "summary": event.schema["description"],
            "contentType": "application/json",
            "headers": headers(event),
            "payload": { "schemaFormat": "application/schema+json;version=draft-07", "schema": event.schema },
            "examples": event.golden.iter().map(|golden| json!({ "payload": serde_json::from_str::<Value>(golden).unwrap() }))
                .collect::<Vec<_>>()
        });
        let channel = json!({ "$ref": format!("#/channels/{}", event.name) });
        document["operations"]
            [format!("{} publishes {}", event.source, event.name).replace(' ', "_")] = json!({ "action": "send", "channel": channel, "summary": format!("{} publishes the event from its outbox.", event.source) });
        for reader in event.readers {
            document["operations"][format!("{reader} receives {}", event.name).replace(' ', "_")] = json!({ "action": "receive", "channel": channel, "summary": format!("{reader} receives the event with a durable consumer.") });
        }
    }
    document["channels"]["DeadLetters"] = json!({
        "address": "gozon.dlq.{service}",
        "description": format!("Copies of dead letters, for tools, in stream {DLQ_STREAM}. The tables are authoritative."),
        "parameters": { "service": { "enum": ["orders", "payments"], "description": "The service that could not apply the message." } },
        "messages": { "DeadLetter": {
            "name": "gozon.dead_letter.v1",
            "contentType": "application/json",
            "payload": { "type": "object", "description": "The dead letter, for people and tools. This format is not part of the contract." }
        } }
    });
    document
}

fn assert_committed(path: &str, document: &Value) {
    let file = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(path);
    let text = format!("{}\n", serde_json::to_string_pretty(document).unwrap());
    if std::env::var_os(UPDATE).is_some() {
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(&file, &text).unwrap();
    }
    let committed = std::fs::read_to_string(&file).unwrap_or_default();
    assert_eq!(committed, text, "{path} is outdated: run ./dev schemas");
}

#[test]
fn the_committed_schemas_match_the_types() {
    for event in events() {
        assert_committed(
            &format!("schemas/{}.schema.json", event.kind),
            &event.schema,
        );
    }
}

#[test]
fn the_committed_asyncapi_document_matches_the_types() {
    assert_committed("asyncapi.json", &asyncapi(&events()));
}

#[test]
fn a_schema_accepts_and_rejects_the_same_as_the_types() {
    for event in events() {
        let validator = jsonschema::draft7::new(&event.schema).unwrap();
        for golden in event.golden {
            let good: Value = serde_json::from_str(golden).unwrap();
            assert!(validator.is_valid(&good), "{}: {golden}", event.kind);
            let mut newer = good.clone();
            newer["a_field_of_tomorrow"] = json!(1);
            assert!(
                validator.is_valid(&newer),
                "{} does not tolerate an unknown field",
                event.kind
            );
            for (field, bad) in [
                ("amount", json!(0)),
                ("amount", json!(1.5)),
                ("amount", json!("1299")),
                ("amount", json!(1_000_000_000_001_i64)),
                ("user_id", json!("a b")),
                ("user_id", json!("")),
                ("user_id", json!(".")),
                ("user_id", json!("..")),
                ("user_id", json!("x".repeat(65))),
                ("order_id", json!("1")),
                ("reason", json!("a whim")),
                ("outcome", json!("maybe")),
            ] {
                if good.get(field).is_some() {
                    let mut event_with = good.clone();
                    event_with[field] = bad.clone();
                    assert!(
                        !validator.is_valid(&event_with),
                        "{} accepts {field} = {bad}",
                        event.kind
                    );
                }
            }
            for field in good.as_object().unwrap().keys() {
                let mut without = good.clone();
                without.as_object_mut().unwrap().remove(field);
                assert!(
                    !validator.is_valid(&without),
                    "{} does not require {field}",
                    event.kind
                );
            }
        }
    }
}
