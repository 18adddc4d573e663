//! Every error points to a page that explains it.

use bytes::Bytes;

use crate::harness::{Gateway, Reaction, ok};

#[tokio::test]
async fn every_code_in_the_document_has_a_page() {
    let gateway = Gateway::start(|_| Reaction::Answers(ok("{}"))).await;
    let document = gateway.http.get("/openapi.json").await.unwrap().json();
    let codes = document["components"]["schemas"]["ProblemCode"]["enum"]
        .as_array()
        .unwrap();
    assert!(codes.len() > 20, "{codes:?}");
    for code in codes {
        let path = format!("/problems/{}", code.as_str().unwrap());
        let page = gateway.http.get(&path).await.unwrap();
        assert_eq!(
            (page.status, page.header("content-type")),
            (200, Some("text/html; charset=utf-8")),
            "{path}"
        );
        let headers = [("accept", "application/json")];
        let json = gateway
            .http
            .request("GET", &path, &headers, Bytes::new())
            .await
            .unwrap()
            .json();
        assert_eq!(json["code"], *code, "{path}");
        for part in ["title", "cause", "advice"] {
            let text = json[part].as_str().unwrap();
            assert!(page.text().contains(text), "{path} does not say {text}");
        }
    }
}

#[tokio::test]
async fn the_type_of_a_problem_points_to_its_page() {
    let gateway = Gateway::start(|_| Reaction::Answers(ok("{}"))).await;
    let problem = gateway.http.get("/problems/nothing").await.unwrap();
    assert_eq!(problem.status, 404);
    let page = problem.json()["type"].as_str().unwrap().to_owned();
    assert_eq!(gateway.http.get(&page).await.unwrap().status, 200, "{page}");
}
