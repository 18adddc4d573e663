//! The examples of the OpenAPI document work when executed from top to bottom.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde_json::Value;
use stack::http::Answer;

use crate::shop::Shop;

/// Operations that need data which a new installation does not have.
const WITHOUT_EXAMPLES: [&str; 1] = ["replayDeadLetter"];

/// A document with its references resolved.
struct Document(Value);

impl Document {
    fn follow<'a>(&'a self, value: &'a Value) -> &'a Value {
        match value["$ref"].as_str() {
            Some(reference) => self
                .0
                .pointer(&reference[1..])
                .unwrap_or_else(|| panic!("{reference} leads nowhere")),
            None => value,
        }
    }

    /// The example of a body, next to its schema or inside it.
    fn example<'a>(&'a self, content: &'a Value) -> &'a Value {
        match &content["example"] {
            Value::Null => &self.follow(&content["schema"])["example"],
            example => example,
        }
    }
}

#[tokio::test]
async fn the_examples_work_when_executed_in_order() {
    let shop = Shop::start().await;
    let document = Document(shop.http.get("/openapi.json").await.unwrap().json());
    // Values from answers that later requests need, by operation and parameter.
    let mut links: BTreeMap<(String, String), String> = BTreeMap::new();
    let mut executed = Vec::new();
    // For the same path, create before read.
    let paths = document.0["paths"].as_object().unwrap();
    let operations = paths
        .iter()
        .flat_map(|(path, item)| ["post", "get"].map(|method| (path, method, &item[method])));
    for (path, method, operation) in operations.filter(|(_, _, operation)| !operation.is_null()) {
        let name = operation["operationId"].as_str().unwrap();
        let (status, success) = operation["responses"]
            .as_object()
            .unwrap()
            .iter()
            .find(|(status, _)| status.starts_with('2'))
            .unwrap();
        let content = &success["content"];
        if WITHOUT_EXAMPLES.contains(&name) || content.get("text/event-stream").is_some() {
            continue;
        }
        let mut url = path.clone();
        let mut query = Vec::new();
        let mut headers = vec![("content-type".to_owned(), "application/json".to_owned())];
        for parameter in operation["parameters"].as_array().into_iter().flatten() {
            let parameter = document.follow(parameter);
            let parameter_name = parameter["name"].as_str().unwrap();
            let example = match (&parameter["example"], &parameter["schema"]["example"]) {
                (Value::Null, example) | (example, _) => example,
            };
            let linked = links
                .get(&(name.to_owned(), parameter_name.to_owned()))
                .cloned();
            let example = linked.or_else(|| match example {
                Value::Null => None,
                Value::String(text) => Some(text.clone()),
                other => Some(other.to_string()),
            });
            match (parameter["in"].as_str().unwrap(), example) {
                ("path", Some(value)) => {
                    url = url.replace(&format!("{{{parameter_name}}}"), &value)
                }
                ("path", None) => {
                    panic!("{name}: neither an example nor a link for {parameter_name}")
                }
                ("query", Some(value)) => query.push(format!("{parameter_name}={value}")),
                ("header", Some(value)) => headers.push((parameter_name.to_owned(), value)),
                _ => {}
            }
        }
        if !query.is_empty() {
            url = format!("{url}?{}", query.join("&"));
        }
        let body = match &operation["requestBody"] {
            Value::Null => Bytes::new(),
            body => {
                let example = document.example(&body["content"]["application/json"]);
                assert!(example.is_object(), "{name} has no example of a body");
                example.to_string().into()
            }
        };
        let headers: Vec<(&str, &str)> = headers
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .collect();
        let answer: Answer = shop
            .http
            .request(&method.to_uppercase(), &url, &headers, body)
            .await
            .unwrap();
        assert_eq!(
            answer.status.to_string(),
            *status,
            "{name}: {method} {url}: {}",
            answer.text()
        );

        // The example of the answer has the shape of the answer.
        let (got, shown) = (
            answer.json(),
            document.example(&content["application/json"]),
        );
        if let (Some(got), Some(shown)) = (got.as_object(), shown.as_object()) {
            assert_eq!(
                got.keys().collect::<Vec<_>>(),
                shown.keys().collect::<Vec<_>>(),
                "{name}"
            );
        }
        for link in success["links"]
            .as_object()
            .into_iter()
            .flat_map(|links| links.values())
        {
            for (parameter, expression) in link["parameters"].as_object().into_iter().flatten() {
                let pointer = expression
                    .as_str()
                    .unwrap()
                    .strip_prefix("$response.body#")
                    .unwrap();
                let value = got
                    .pointer(pointer)
                    .and_then(Value::as_str)
                    .unwrap_or_else(|| panic!("{name}: no {pointer}"));
                links.insert(
                    (
                        link["operationId"].as_str().unwrap().to_owned(),
                        parameter.clone(),
                    ),
                    value.to_owned(),
                );
            }
        }
        executed.push(name);
    }
    for name in [
        "createAccount",
        "createDeposit",
        "getAccount",
        "createOrder",
        "getOrder",
        "listOrders",
    ] {
        assert!(executed.contains(&name), "{name} is not among {executed:?}");
    }
    assert_eq!(
        shop.assert_settled(1).await,
        1,
        "the order of the example is paid with the money of the example"
    );
}
