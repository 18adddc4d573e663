//! Placing, finding and listing orders.

use futures_util::future::join_all;
use sea_orm::{ConnectionTrait as _, TransactionTrait as _};
use serde_json::{Value, json};

use crate::harness::{Orders, id};

#[tokio::test]
async fn an_order_is_stored_with_its_event_and_published() {
    let orders = Orders::start().await;
    let body = json!({ "user_id": "alice", "amount": 1299, "description": "Книга, \"signed\"" });
    let placed = orders
        .http
        .post("/v1/orders", Some("k"), &body)
        .await
        .unwrap();
    assert_eq!(placed.status, 201, "{}", placed.text());
    let order = placed.json();
    let expected = [
        ("user_id", json!("alice")),
        ("amount", json!(1299)),
        ("status", json!("NEW")),
        ("reason", json!(null)),
    ];
    for (field, value) in expected {
        assert_eq!(order[field], value, "{field}");
    }
    assert_eq!(
        (&order["description"], &order["updated_at"]),
        (&body["description"], &order["created_at"])
    );
    let location = placed.header("location").unwrap();
    assert_eq!(location, format!("/v1/orders/{}", id(&order)));
    assert_eq!(orders.http.get(location).await.unwrap().json(), order);

    orders
        .until(
            "it is published",
            "SELECT count(*) FROM outbox WHERE n = 0 AND published_at IS NOT NULL AND stream_sequence = 1",
            1,
        )
        .await;
    let row = orders.row(id(&order)).await;
    let event = format!(
        r#"SELECT count(*) FROM outbox WHERE event_id = '{}' AND n = 0 AND subject = 'gozon.orders.placed' AND attempts = 1
           AND payload = '{{"order_id":"{}","user_id":"alice","amount":1299}}'"#,
        row.placed_event_id,
        id(&order)
    );
    assert_eq!(orders.count(&event).await, 1);
}

#[tokio::test]
async fn the_same_key_gets_the_first_answer_and_other_content_is_refused() {
    let orders = Orders::start().await;
    let first = orders.place(Some("k"), "alice", 10).await;
    let payments = orders.payments().await;
    let settled =
        crate::harness::settlement(id(&first.json()), shared_contracts::PaymentOutcome::Paid);
    payments.publish(&settled).await;
    orders.until_status(id(&first.json()), "FINISHED").await;

    let again = orders.place(Some("k"), "alice", 10).await;
    assert_eq!(
        (again.status, again.header("idempotency-replayed")),
        (201, Some("true"))
    );
    assert_eq!(
        again.body, first.body,
        "the same bytes, although the order is FINISHED now"
    );
    assert_eq!(again.header("location"), first.header("location"));
    let other = orders.place(Some("k"), "alice", 11).await;
    assert_eq!(
        (other.status, &other.json()["code"]),
        (422, &json!("idempotency_key_reused"))
    );

    assert_eq!(
        orders
            .place(Some("k"), "bob", 10)
            .await
            .header("idempotency-replayed"),
        None,
        "another user may use the same key"
    );
    assert_eq!(orders.count("SELECT count(*) FROM orders").await, 2);
    assert_eq!(
        orders
            .count("SELECT count(*) FROM outbox WHERE subject = 'gozon.orders.placed' AND n = 0")
            .await,
        2
    );
}

#[tokio::test]
async fn f02_fifty_parallel_posts_with_one_key_on_two_replicas_make_one_order() {
    let orders = Orders::start().await;
    let second = orders.replica().await;
    let replicas = [
        orders.http.clone(),
        stack::http::Http::new(format!("http://{}", second.address)),
    ];
    let body = json!({ "user_id": "alice", "amount": 10 });
    let posts = (0..50).map(|number| replicas[number % 2].post("/v1/orders", Some("one"), &body));
    let answers: Vec<_> = join_all(posts)
        .await
        .into_iter()
        .map(Result::unwrap)
        .collect();
    assert!(
        answers
            .iter()
            .all(|answer| answer.status == 201 && answer.body == answers[0].body)
    );
    assert_eq!(
        answers
            .iter()
            .filter(|answer| answer.header("idempotency-replayed").is_none())
            .count(),
        1
    );
    assert_eq!(orders.count("SELECT count(*) FROM orders").await, 1);
    assert_eq!(
        orders
            .count("SELECT count(*) FROM outbox WHERE n = 0")
            .await,
        1
    );
    second.stop().await.unwrap();
}

#[tokio::test]
async fn requests_that_queue_while_a_transaction_runs_are_all_answered() {
    let orders = Orders::start().await;
    let holder = orders
        .database
        .connect()
        .await
        .unwrap()
        .begin()
        .await
        .unwrap();
    holder
        .execute_unprepared("LOCK TABLE orders IN SHARE MODE")
        .await
        .unwrap();
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()";
    let plug = orders.place(Some("plug"), "alice", 1);
    let group = async {
        orders
            .until("the first transaction waits", waiting, 1)
            .await;
        let twins = (0..10).map(|_| orders.place(Some("twin"), "alice", 10));
        let others = (0..30).map(|_| orders.place(None, "bob", 10));
        let (twins, other_content, others, ()) = tokio::join!(
            join_all(twins),
            orders.place(Some("plug"), "alice", 2),
            join_all(others),
            async { holder.rollback().await.unwrap() }
        );
        assert!(
            twins
                .iter()
                .all(|twin| twin.status == 201 && twin.body == twins[0].body),
            "all requests with one key get the same answer"
        );
        assert_eq!(
            twins
                .iter()
                .filter(|twin| twin.header("idempotency-replayed").is_none())
                .count(),
            1
        );
        assert_eq!(
            other_content.json()["code"],
            "idempotency_key_reused",
            "one bad request does not fail the others"
        );
        assert!(others.iter().all(|other| other.status == 201));
    };
    let (plug, ()) = tokio::join!(plug, group);
    assert_eq!(plug.status, 201);
    assert_eq!(orders.count("SELECT count(*) FROM orders").await, 32);
    assert_eq!(
        orders
            .count("SELECT count(*) FROM outbox WHERE n = 0")
            .await,
        32
    );
}

#[tokio::test]
async fn the_counter_of_rejected_requests_starts_at_zero() {
    let orders = Orders::start().await;
    let page = orders.http.get("/metrics").await.unwrap().text();
    assert!(
        page.contains("gozon_http_refused_total{reason=\"orders_queue\"} "),
        "{page}"
    );
}

#[tokio::test]
async fn an_order_that_the_database_always_refuses_does_not_fail_its_group() {
    let orders = Orders::start().await;
    orders
        .database
        .connect()
        .await
        .unwrap()
        .execute_unprepared(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                 RAISE EXCEPTION 'the guilty one' USING ERRCODE = '22000';
             END $$;
             CREATE TRIGGER refuse BEFORE INSERT ON orders FOR EACH ROW WHEN (NEW.user_id = 'guilty') EXECUTE FUNCTION refuse()",
        )
        .await
        .unwrap();
    let users = (0..40).map(|number| {
        if number % 10 == 7 {
            "guilty"
        } else {
            "innocent"
        }
    });
    let answers = join_all(users.clone().map(|user| orders.place(None, user, 10))).await;
    for (user, answer) in users.zip(answers) {
        assert_eq!(
            answer.status,
            if user == "guilty" { 500 } else { 201 },
            "{}",
            answer.text()
        );
        assert!(
            !answer.text().contains("guilty one"),
            "an answer shows no internal error"
        );
    }
    assert_eq!(orders.count("SELECT count(*) FROM orders").await, 36);
}

#[tokio::test]
async fn bad_input_is_refused_with_advice_and_nothing_is_stored() {
    let orders = Orders::start().await;
    let good = json!({ "user_id": "alice", "amount": 10, "description": "" });
    let mut cases: Vec<(Value, &str)> = vec![
        (json!([]), ""),
        (json!({ "amount": 1 }), "/user_id"),
        (json!({ "user_id": "a" }), "/amount"),
    ];
    for (pointer, values) in [
        (
            "/user_id",
            vec![
                json!(""),
                json!("a b"),
                json!(7),
                json!(null),
                json!("x".repeat(65)),
                json!(".."),
                json!("."),
            ],
        ),
        (
            "/amount",
            vec![
                json!(0),
                json!(-1),
                json!(1.5),
                json!("1"),
                json!(1_000_000_000_001_i64),
                json!(null),
                json!([1]),
            ],
        ),
        (
            "/description",
            vec![json!("\0"), json!("x".repeat(501)), json!(1), json!(null)],
        ),
        ("/status", vec![json!("FINISHED")]),
        ("/id", vec![json!("01933f3c-7d5a-7b60-9d6f-3f0b4b1f2a11")]),
    ] {
        for value in values {
            let mut body = good.clone();
            body[&pointer[1..]] = value;
            cases.push((body, pointer));
        }
    }
    for (body, pointer) in cases {
        let answer = orders.http.post("/v1/orders", None, &body).await.unwrap();
        assert_eq!(
            (answer.status, &answer.json()["code"]),
            (422, &json!("validation_failed")),
            "{body}"
        );
        assert_eq!(answer.json()["errors"][0]["pointer"], pointer, "{body}");
    }
    let long = "ж".repeat(500);
    let longest = orders
        .http
        .post(
            "/v1/orders",
            None,
            &json!({ "user_id": "a", "amount": 1, "description": long }),
        )
        .await
        .unwrap();
    assert_eq!(
        longest.status, 201,
        "500 characters are accepted, however many bytes they have"
    );

    for (headers, body, status) in [
        (
            vec![("content-type", "application/json")],
            r#"{"user_id":"a","amount":1e3}"#.to_owned(),
            422,
        ),
        (
            vec![("content-type", "application/json")],
            "{".to_owned(),
            400,
        ),
        (vec![("content-type", "text/plain")], good.to_string(), 415),
        (
            vec![
                ("content-type", "application/json"),
                ("idempotency-key", "\"open"),
            ],
            good.to_string(),
            400,
        ),
        (
            vec![("content-type", "application/json")],
            format!("{{\"description\":\"{}\"}}", "x".repeat(20_000)),
            413,
        ),
    ] {
        let answer = orders
            .http
            .request("POST", "/v1/orders", &headers, body.into())
            .await
            .unwrap();
        assert_eq!(answer.status, status, "{}", answer.text());
        assert_eq!(
            answer.header("content-type"),
            Some("application/problem+json")
        );
    }
    for path in [
        "/v1/orders/7",
        "/v1/orders/01933f3c-7d5a-7b60-9d6f-3f0b4b1f2a11",
    ] {
        assert_eq!(
            orders.http.get(path).await.unwrap().json()["code"],
            "order_not_found",
            "{path}"
        );
    }
    for query in [
        "limit=0",
        "limit=101",
        "limit=x",
        "status=new",
        "cursor=x",
        "user_id=a%20b",
        "statsu=NEW",
        "limit=1&limit=2",
    ] {
        let answer = orders
            .http
            .get(&format!("/v1/orders?{query}"))
            .await
            .unwrap();
        assert_eq!(answer.status, 422, "{query}");
        assert_eq!(
            answer.json()["errors"][0]["pointer"],
            query.split('=').next().unwrap(),
            "{query}"
        );
    }
    let id = longest.json()["id"].as_str().unwrap().to_owned();
    for path in [
        "/v1/orders",
        &format!("/v1/orders/{id}"),
        &format!("/v1/orders/{id}/timeline"),
        "/v1/ops/flow",
    ] {
        let answer = orders
            .http
            .get(&format!("{path}?surprise=1"))
            .await
            .unwrap();
        assert_eq!(
            (answer.status, &answer.json()["errors"][0]["pointer"]),
            (422, &json!("surprise")),
            "{path}"
        );
    }
    let answer = orders
        .http
        .post("/v1/orders?surprise=1", None, &good)
        .await
        .unwrap();
    assert_eq!(
        (answer.status, &answer.json()["errors"][0]["pointer"]),
        (422, &json!("surprise"))
    );
    assert_eq!(orders.count("SELECT count(*) FROM orders").await, 1);
}

#[tokio::test]
async fn a_list_is_newest_first_and_new_orders_do_not_shift_its_pages() {
    let orders = Orders::start().await;
    let mut of_alice = Vec::new();
    for number in 0..7 {
        of_alice.push(id(&orders.place(None, "alice", 10 + number).await.json()));
        orders.place(None, "bob", 10).await;
    }
    of_alice.reverse();
    let mut seen = Vec::new();
    let mut cursor = String::new();
    loop {
        let page = orders
            .http
            .get(&format!("/v1/orders?user_id=alice&limit=3{cursor}"))
            .await
            .unwrap()
            .json();
        seen.extend(page["items"].as_array().unwrap().iter().map(id));
        orders.place(None, "alice", 1).await;
        match page["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => break,
        }
    }
    assert_eq!(seen, of_alice);

    let number = async |query: &str| {
        orders
            .http
            .get(&format!("/v1/orders{query}"))
            .await
            .unwrap()
            .json()["items"]
            .as_array()
            .unwrap()
            .len()
    };
    assert_eq!(
        number("").await,
        17,
        "without a user id, the orders of all users"
    );
    assert_eq!(number("?user_id=bob&status=NEW").await, 7);
    assert_eq!(number("?user_id=bob&status=FINISHED").await, 0);
    assert_eq!(number("?user_id=nobody").await, 0);
}
