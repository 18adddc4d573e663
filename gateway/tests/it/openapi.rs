//! The committed OpenAPI document matches the code.

use serde_json::Value;

use crate::harness::{Gateway, Reaction, ok};

#[test]
fn the_openapi_document_in_the_repository_is_current() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/openapi.json");
    let current = gateway::openapi().to_pretty_json().unwrap() + "\n";
    if std::env::var_os("GOZON_UPDATE_SNAPSHOTS").is_some() {
        std::fs::write(path, &current).unwrap();
    }
    let stored = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        stored == current,
        "gateway/openapi.json is outdated: run `./dev openapi` and review the difference"
    );
}

#[test]
fn every_operation_has_a_name_a_described_tag_and_error_examples() {
    let document = serde_json::to_value(gateway::openapi()).unwrap();
    let tags: Vec<&Value> = document["tags"]
        .as_array()
        .unwrap()
        .iter()
        .map(|tag| &tag["name"])
        .collect();
    let mut names = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            let what = format!("{method} {path}");
            names.push(
                operation["operationId"]
                    .as_str()
                    .unwrap_or_else(|| panic!("{what} has no name")),
            );
            assert!(operation["summary"].is_string(), "{what} has no summary");
            for tag in operation["tags"].as_array().unwrap() {
                assert!(tags.contains(&tag), "{what}: tag {tag} has no description");
            }
            let responses = operation["responses"].as_object().unwrap();
            for status in ["429", "500", "503", "400", "431"] {
                assert!(
                    responses.contains_key(status),
                    "{what} does not document {status}"
                );
            }
            for (status, response) in responses {
                let response = match response["$ref"].as_str() {
                    Some(reference) => document
                        .pointer(&reference[1..])
                        .unwrap_or_else(|| panic!("{reference} does not exist")),
                    None => response,
                };
                // Headers that are too large are rejected with a bare status.
                if status.starts_with('2') || status == "431" {
                    continue;
                }
                let content = &response["content"]["application/problem+json"];
                assert_eq!(
                    content["schema"]["$ref"], "#/components/schemas/Problem",
                    "{what} {status}"
                );
                assert_eq!(content["example"]["status"].to_string(), *status, "{what}");
            }
        }
    }
    let count = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), count, "operation names are unique");
}

#[tokio::test]
async fn the_document_is_served_as_json_and_as_yaml() {
    let gateway = Gateway::start(|_| Reaction::Answers(ok("{}"))).await;
    let json = gateway.http.get("/openapi.json").await.unwrap();
    assert_eq!(json.json()["openapi"], "3.1.0");
    let yaml = gateway.http.get("/openapi.yaml").await.unwrap();
    assert_eq!(
        (yaml.status, yaml.header("content-type")),
        (200, Some("application/yaml"))
    );
    assert!(
        yaml.text().starts_with("openapi: 3.1.0\n"),
        "{}",
        &yaml.text()[..80]
    );
    for operation in ["createOrder", "createDeposit"] {
        assert!(
            yaml.text().contains(operation) && json.text().contains(operation),
            "{operation}"
        );
    }
}

/// Swagger UI offers the whole document and each service's part of it.
#[tokio::test]
async fn the_documents_of_the_services_match_the_gateways_document() {
    let gateway = Gateway::start(|_| Reaction::Answers(ok("{}"))).await;
    let whole = gateway.http.get("/openapi.json").await.unwrap().json();
    for (part, operation) in [("orders", "createOrder"), ("payments", "createDeposit")] {
        let document = gateway
            .http
            .get(&format!("/openapi/{part}.json"))
            .await
            .unwrap()
            .json();
        assert!(document.to_string().contains(operation), "{document}");
        let mut tags: Vec<&str> = Vec::new();
        for (path, item) in document["paths"].as_object().unwrap() {
            for (method, operation) in item.as_object().unwrap() {
                assert_eq!(whole["paths"][path][method], *operation, "{method} {path}");
                tags.extend(
                    operation["tags"]
                        .as_array()
                        .unwrap()
                        .iter()
                        .map(|tag| tag.as_str().unwrap()),
                );
            }
        }
        for (name, schema) in document["components"]["schemas"].as_object().unwrap() {
            assert_eq!(whole["components"]["schemas"][name], *schema, "{name}");
        }
        for tag in document["tags"].as_array().unwrap() {
            assert!(
                tags.contains(&tag["name"].as_str().unwrap()),
                "{part}: {tag} is empty"
            );
        }
    }
}
