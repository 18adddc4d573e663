//! The gateway under test, a scripted backend, and a client that sends arbitrary bytes.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use clap::Parser as _;
use gateway::{App, Config};
use serde_json::Value;
use stack::http::Http;
use stack::testing::InProcessService;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;

/// Long enough for a busy machine; reached only by failing tests.
pub(crate) const SOON: Duration = Duration::from_secs(30);

/// A request as the backend received it.
#[derive(Clone, Debug, Default)]
pub(crate) struct ReceivedRequest {
    /// Method and path.
    pub(crate) line: String,
    /// Names in lower case, in the received order.
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: String,
}

impl ReceivedRequest {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(other, _)| other == name)
            .map(|(_, value)| value.as_str())
    }
}

/// What the backend does with a request.
#[derive(Clone)]
pub(crate) enum Reaction {
    /// Sends these bytes.
    Answers(String),
    /// Sends these bytes and closes the connection, without the header `Connection: close`.
    AnswersThenCloses(String),
    /// Answers 200 when the test allows it.
    AnswersWhen(Arc<Notify>),
}

/// A 200 response with this JSON body.
pub(crate) fn ok(body: &str) -> String {
    format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// A scripted service behind the gateway.
#[derive(Clone)]
pub(crate) struct Service {
    pub(crate) address: SocketAddr,
    seen: Arc<Mutex<Vec<ReceivedRequest>>>,
}

impl Service {
    pub(crate) async fn start(
        does: impl Fn(&ReceivedRequest) -> Reaction + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let service = Self {
            address: listener.local_addr().unwrap(),
            seen: Arc::default(),
        };
        let (seen, does) = (service.seen.clone(), Arc::new(does));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(handle_connection(stream, seen.clone(), does.clone()));
            }
        });
        service
    }

    pub(crate) fn requests(&self) -> Vec<ReceivedRequest> {
        self.seen.lock().unwrap().clone()
    }
}

async fn handle_connection(
    mut stream: TcpStream,
    seen: Arc<Mutex<Vec<ReceivedRequest>>>,
    does: Arc<impl Fn(&ReceivedRequest) -> Reaction>,
) -> Option<()> {
    let mut bytes = Vec::new();
    loop {
        let end = loop {
            if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
                break end;
            }
            if stream.read_buf(&mut bytes).await.ok()? == 0 {
                return None;
            }
        };
        let head = String::from_utf8(bytes.drain(..end + 4).collect()).unwrap();
        let mut lines = head.trim_end().lines();
        let line = lines
            .next()
            .unwrap()
            .trim_end_matches(" HTTP/1.1")
            .to_owned();
        let headers = lines.map(|line| line.split_once(':').unwrap());
        let headers = headers
            .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
            .collect();
        let mut request = ReceivedRequest {
            line,
            headers,
            body: String::new(),
        };
        let length: usize = request
            .header("content-length")
            .map_or(0, |length| length.parse().unwrap());
        while bytes.len() < length {
            assert!(stream.read_buf(&mut bytes).await.ok()? > 0);
        }
        request.body = String::from_utf8(bytes.drain(..length).collect()).unwrap();
        let then = does(&request);
        seen.lock().unwrap().push(request);
        match then {
            Reaction::Answers(answer) => stream.write_all(answer.as_bytes()).await.ok()?,
            Reaction::AnswersThenCloses(answer) => {
                return stream.write_all(answer.as_bytes()).await.ok();
            }
            Reaction::AnswersWhen(told) => {
                told.notified().await;
                stream.write_all(ok("{}").as_bytes()).await.ok()?;
            }
        }
    }
}

/// A gateway, and one backend that replaces both services.
pub(crate) struct Gateway {
    pub(crate) http: Http,
    pub(crate) address: SocketAddr,
    pub(crate) backend: Service,
    process: InProcessService,
}

impl Gateway {
    pub(crate) async fn start(
        does: impl Fn(&ReceivedRequest) -> Reaction + Send + Sync + 'static,
    ) -> Self {
        Self::start_with(&[], does).await
    }

    pub(crate) async fn start_with(
        arguments: &[&str],
        does: impl Fn(&ReceivedRequest) -> Reaction + Send + Sync + 'static,
    ) -> Self {
        let backend = Service::start(does).await;
        let service = format!("http://{}", backend.address);
        let urls = [
            format!("--orders-url={service}"),
            format!("--payments-url={service}"),
        ];
        let fixed = ["gateway", "--listen=127.0.0.1:0", &urls[0], &urls[1]];
        let config = Config::try_parse_from(fixed.iter().chain(arguments)).unwrap();
        let process = InProcessService::start(async move |address, shutdown| {
            let app = App::build(config).await?;
            // The test may have given up waiting.
            let _ = address.send(app.address()?);
            app.run(shutdown).await
        });
        let process = process.await.unwrap();
        let address = process.address;
        Self {
            http: Http::new(format!("http://{address}")),
            address,
            backend,
            process,
        }
    }

    /// Stops the gateway gracefully.
    pub(crate) async fn stop(self) {
        self.process.stop().await.unwrap();
    }

    /// Sends raw bytes, and reads until the gateway closes the connection.
    pub(crate) async fn send_raw(&self, bytes: &str) -> String {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        // The gateway may reject the request before it has read all of it.
        let _ = stream.write_all(bytes.as_bytes()).await;
        let mut answer = Vec::new();
        tokio::time::timeout(SOON, stream.read_to_end(&mut answer))
            .await
            .unwrap()
            .unwrap();
        String::from_utf8(answer).unwrap()
    }

    /// Number of requests rejected for this reason.
    pub(crate) async fn rejected_count(&self, reason: &str) -> u64 {
        let page = self.http.get("/metrics").await.unwrap().text();
        let series = format!("gozon_http_refused_total{{reason=\"{reason}\"}} ");
        page.lines()
            .find_map(|line| line.strip_prefix(&series)?.parse().ok())
            .unwrap_or(0)
    }
}

/// Status and code of an answer. Asserts that it is a problem document with the request id.
pub(crate) fn problem(answer: &str) -> (u16, String) {
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .unwrap_or_else(|| panic!("no answer: {answer:?}"));
    let document: Value =
        serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {answer:?}"));
    let header = |name: &str| {
        head.lines()
            .find_map(|line| line.strip_prefix(&format!("{name}: ")))
            .unwrap_or_default()
    };
    assert_eq!(
        header("content-type"),
        "application/problem+json",
        "{answer}"
    );
    assert!(
        !header("x-request-id").is_empty() && document["request_id"] == header("x-request-id"),
        "{answer}"
    );
    let status: u16 = head[9..12].parse().unwrap();
    assert_eq!(document["status"], status, "{answer}");
    (status, document["code"].as_str().unwrap().to_owned())
}
