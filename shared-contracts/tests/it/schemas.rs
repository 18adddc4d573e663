//! The documents for readers in other languages, made from the types: a JSON Schema for each event, and one AsyncAPI
//! document. They are committed; a test that finds them different says how to make them anew.

use std::path::PathBuf;

use serde_json::{Value, json};
use shared_contracts::{
    DLQ_STREAM, Event, OrderCancelled, OrderFinished, OrderPlaced, PaymentSettled, SPEC_VERSION,
    header,
};

const UPDATE: &str = "GOZON_UPDATE_SNAPSHOTS";

/// What the documents say about an event.
struct Described {
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
) -> Described {
    // One schema without references, in the dialect that every tool reads.
    let settings = schemars::generate::SchemaSettings::draft07()
        .with(|settings| settings.inline_subschemas = true);
    let mut schema = settings
        .into_generator()
        .into_root_schema_for::<E>()
        .to_value();
    schema["$id"] = Value::from(format!("urn:gozon:event:{}", E::TYPE));
    let name = schema["title"].as_str().unwrap().to_owned();
    Described {
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

fn events() -> [Described; 4] {
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

fn headers(event: &Described) -> Value {
    let text = |description: &str| json!({ "type": "string", "description": description });
    let id = |description: &str| json!({ "type": "string", "format": "uuid", "description": description });
    json!({
        "type": "object",
        "required": [header::SPEC_VERSION, header::ID, header::TYPE, header::SOURCE, header::TIME, header::SUBJECT, header::MESSAGE_ID],
        "properties": {
            header::SPEC_VERSION: { "type": "string", "const": SPEC_VERSION },
            header::ID: id("The fact; the same over every re-send. What readers recognise a repetition by."),
            header::TYPE: { "type": "string", "const": event.kind },
            header::SOURCE: { "type": "string", "const": event.source },
            header::TIME: { "type": "string", "format": "date-time", "description": "When the fact was made." },
            header::SUBJECT: id("The order."),
            header::MESSAGE_ID: text("The broker's de-duplication id: the event id, or with `.r<n>` behind it for the n-th re-ask."),
            header::ASK: { "type": "string", "pattern": "^[0-9]+$", "description": "Which re-ask this is; absent on the first sending." },
            header::EXPECTED_STREAM: { "type": "string", "const": event.stream },
            header::TRACEPARENT: text("W3C trace context."),
        }
    })
}

fn asyncapi(events: &[Described]) -> Value {
    let mut document = json!({
        "asyncapi": "3.0.0",
        "info": {
            "title": "Gozon events",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "What the services say to each other over NATS JetStream, as CloudEvents in binary mode: attributes are \
                            message headers, the body is plain JSON. Every message may come more than once and in any order; \
                            readers recognise a repetition by `ce-id` and tolerate unknown fields.",
            "license": { "name": "MIT OR Apache-2.0" }
        },
        "defaultContentType": "application/json",
        "servers": { "local": { "host": "127.0.0.1:4222", "protocol": "nats", "description": "As `./dev up` starts it." } },
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
        document["operations"][format!("{} says {}", event.source, event.name).replace(' ', "_")] = json!({ "action": "send", "channel": channel, "summary": format!("{} publishes it from its outbox.", event.source) });
        for reader in event.readers {
            document["operations"][format!("{reader} takes {}", event.name).replace(' ', "_")] = json!({ "action": "receive", "channel": channel, "summary": format!("{reader} takes it with a durable consumer.") });
        }
    }
    document["channels"]["DeadLetters"] = json!({
        "address": "gozon.dlq.{service}",
        "description": format!("Copies of dead letters, for tools, in stream {DLQ_STREAM}; the tables are the truth."),
        "parameters": { "service": { "enum": ["orders", "payments"], "description": "Who could not apply the message." } },
        "messages": { "DeadLetter": {
            "name": "gozon.dead_letter.v1",
            "contentType": "application/json",
            "payload": { "type": "object", "description": "What became of the message, for people and tools; no contract." }
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
    assert_eq!(
        committed, text,
        "{path} is not what the types say: ./dev schemas makes it anew"
    );
}

#[test]
fn the_committed_schemas_are_those_of_the_types() {
    for event in events() {
        assert_committed(
            &format!("schemas/{}.schema.json", event.kind),
            &event.schema,
        );
    }
}

#[test]
fn the_committed_asyncapi_document_is_that_of_the_types() {
    assert_committed("asyncapi.json", &asyncapi(&events()));
}

#[test]
fn a_schema_accepts_the_golden_files_and_refuses_what_the_types_refuse() {
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
                    "{} does not need {field}",
                    event.kind
                );
            }
        }
    }
}
