//! Live status of orders as server-sent events.

use std::convert::Infallible;
use std::time::Duration;

use axum::Extension;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse as _, Response};
use futures_util::stream;
use http_body_util::BodyExt as _;
use serde::Deserialize;
use serde_json::Value;
use service_kit::Problem;
use service_kit::input::ValidatedQuery;
use service_kit::places::Place;
use service_kit::problem::{Code, ProblemDocument};
use shared_contracts::{OrderId, UserId};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use utoipa::{IntoParams, OpenApi};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::change::{Change, Position};
use crate::client::Client;
use crate::forward::{Forwarder, Service, trace_of};
use crate::limits::Limits;
use crate::listeners::{Filter, News};
use crate::live::{Live, REPLAY_MAX, StoredChange, Subscription};

const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
/// Keeps proxies from closing a silent connection, and tells the client its position.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// Events that are buffered for one client.
const OUTGOING: usize = 64;
/// How long browsers wait before they reconnect.
const RECONNECT_AFTER: Duration = Duration::from_secs(1);
const BROKER_RETRY_DELAY: Duration = Duration::from_millis(250);

/// State of the handlers.
#[derive(Clone)]
pub(crate) struct Events {
    live: Option<Live>,
    forwarder: Forwarder,
    limits: Limits,
    shutdown: CancellationToken,
}

impl Events {
    /// `live` is absent if no broker is configured.
    pub(crate) fn new(
        live: Option<Live>,
        forwarder: Forwarder,
        limits: Limits,
        shutdown: CancellationToken,
    ) -> Self {
        Self {
            live,
            forwarder,
            limits,
            shutdown,
        }
    }

    fn open(&self, client: Client) -> Result<(Live, Place<Client>), Problem> {
        let Some(live) = self.live.clone() else {
            return Err(Code::NoLiveEvents.into());
        };
        Ok((live, self.limits.event_stream(client)?))
    }
}

/// OpenAPI 3.1 can only call a stream of events a text; `x-event-data` names the schema of their data.
#[derive(OpenApi)]
#[openapi(components(schemas(Change)))]
struct Document;

fn example() -> &'static str {
    "id: 7.01933f3c-7d5a-7b60-9d6f-3f0b4b1f2a11\nevent: order\ndata: {\"order_id\":\"01933f3c-7d5a-7b60-9d6f-3f0b4b1f2a11\",\
     \"user_id\":\"alice\",\"amount\":700,\"status\":\"FINISHED\",\"reason\":null,\"at\":\"2026-11-21T10:00:00.123456Z\"}\n\n"
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct FollowOrdersQuery {
    /// Only this user's; without it, all users'
    #[param(inline, nullable = false)]
    user_id: Option<UserId>,
    /// As the header Last-Event-ID, for clients that cannot set it; the header counts more
    #[param(value_type = Option<String>, nullable = false)]
    last_event_id: Option<LastEventId>,
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct FollowOrderQuery {
    /// As the header Last-Event-ID, for clients that cannot set it; the header counts more
    #[param(value_type = Option<String>, nullable = false)]
    last_event_id: Option<LastEventId>,
}

/// Empty before the first event: a browser's EventSource starts with an empty id.
#[derive(Deserialize)]
#[serde(try_from = "String")]
struct LastEventId(Option<Position>);

impl TryFrom<String> for LastEventId {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        match text.as_str() {
            "" => Ok(Self(None)),
            id => id.parse().map(|position| Self(Some(position))),
        }
    }
}

pub(crate) fn api() -> OpenApiRouter<Events> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(follow_orders))
        .routes(routes!(follow_order))
}

/// Follow orders as they change
///
/// Server-sent events. `order`, with an OrderChange as its data: an order is now NEW, FINISHED or CANCELLED. `reset`:
/// events may be missing, so read the orders again; the stream continues from here. Ids are opaque: send the last one as
/// Last-Event-ID, to this gateway or another, to resume after it (browsers do so by themselves). Comments keep the
/// connection alive. The status of an order never goes backwards in the stream, but an event may be older than a list that
/// you have read: a final status stays final.
#[utoipa::path(
    get,
    path = "/v1/orders/events",
    operation_id = "followOrders",
    tag = "orders",
    extensions(("x-event-data" = json!({"$ref": "#/components/schemas/OrderChange"}))),
    params(
        FollowOrdersQuery,
        ("Last-Event-ID" = Option<String>, Header, description = "Go on after this event", nullable = false),
    ),
    responses(
        (status = 200, description = "Events, until one side closes the connection", body = String, content_type = "text/event-stream", example = example),
        (status = 422, description = "A parameter is not acceptable", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "Too many follow already, or live events are switched off", body = ProblemDocument, content_type = "application/problem+json"),
    )
)]
async fn follow_orders(
    State(events): State<Events>,
    Extension(client): Extension<Client>,
    ValidatedQuery(query): ValidatedQuery<FollowOrdersQuery>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let (live, place) = events.open(client)?;
    let filter = query.user_id.map_or(Filter::All, Filter::User);
    let (news, head) = live.subscribe(filter.clone());
    let after = resume_after(query.last_event_id, &headers).unwrap_or(After::Now);
    Ok(respond(
        Session {
            live,
            news,
            head,
            filter,
            opening: None,
            ended: false,
            place,
        },
        after,
        events.shutdown,
    ))
}

/// Follow one order
///
/// As for all orders. Unless it resumes, the stream begins with the order as it is now, or with `reset` if that is unknown.
#[utoipa::path(
    get,
    path = "/v1/orders/{id}/events",
    operation_id = "followOrder",
    tag = "orders",
    extensions(("x-event-data" = json!({"$ref": "#/components/schemas/OrderChange"}))),
    params(
        ("id" = Uuid, Path, description = "Which order"),
        FollowOrderQuery,
        ("Last-Event-ID" = Option<String>, Header, description = "Go on after this event", nullable = false),
    ),
    responses(
        (status = 200, description = "Events, until one side closes the connection", body = String, content_type = "text/event-stream", example = example),
        (status = 404, description = "There is no such order", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 422, description = "A parameter is not acceptable", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "Too many follow already, or live events are switched off", body = ProblemDocument, content_type = "application/problem+json"),
    )
)]
async fn follow_order(
    State(events): State<Events>,
    Extension(client): Extension<Client>,
    Path(id): Path<String>,
    ValidatedQuery(query): ValidatedQuery<FollowOrderQuery>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let Ok(order_id) = id.parse::<OrderId>() else {
        return Err(Code::OrderNotFound.into());
    };
    let (live, place) = events.open(client)?;
    // Subscribing before reading: no change can be missed between the two.
    let filter = Filter::Order(order_id);
    let (news, head) = live.subscribe(filter.clone());
    let found = order_as_it_is(&events.forwarder, client, order_id, &headers).await;
    let opening = match found {
        Ok(found) => found,
        Err(refusal) => return Ok(refusal),
    };
    let after = match (resume_after(query.last_event_id, &headers), &opening) {
        (Some(after), _) => after,
        (None, Some(_)) => After::Now,
        (None, None) => After::Unknown,
    };
    let opening = opening.filter(|_| matches!(after, After::Now));
    Ok(respond(
        Session {
            live,
            news,
            head,
            filter,
            opening,
            ended: false,
            place,
        },
        after,
        events.shutdown,
    ))
}

/// Where the stream begins.
#[derive(Clone, Copy, Debug)]
enum After {
    Now,
    Event(Position),
    /// After an event that is not known.
    Unknown,
}

/// The header counts more than the parameter: a browser sends the header by itself, so it is newer than the URL.
fn resume_after(parameter: Option<LastEventId>, headers: &HeaderMap) -> Option<After> {
    let header = headers
        .get(LAST_EVENT_ID)
        .map(HeaderValue::to_str)
        .filter(|value| !matches!(value, Ok("")));
    match header {
        // An id that is not ours is not refused: a browser would give up for good.
        Some(id) => Some(
            id.ok()
                .and_then(|id| id.parse().ok())
                .map_or(After::Unknown, After::Event),
        ),
        None => parameter.and_then(|LastEventId(position)| position.map(After::Event)),
    }
}

/// The order from its service, `None` if the service is unavailable, or the 404 to return.
async fn order_as_it_is(
    forwarder: &Forwarder,
    client: Client,
    id: OrderId,
    headers: &HeaderMap,
) -> Result<Option<Change>, Response> {
    let request = axum::http::Request::get(format!("/v1/orders/{id}"));
    let mut request = request
        .body(axum::body::Body::empty())
        .expect("a path makes a request");
    *request.headers_mut() = trace_of(headers);
    let answer = forwarder
        .clone()
        .forward(Service::Orders, client, request)
        .await;
    match answer.status() {
        StatusCode::OK => {
            let bytes = answer
                .into_body()
                .collect()
                .await
                .map(|body| body.to_bytes())
                .unwrap_or_default();
            Ok(serde_json::from_slice(&bytes)
                .ok()
                .and_then(|order: Value| Change::of_order(&order)))
        }
        StatusCode::NOT_FOUND => Err(answer),
        _ => Ok(None),
    }
}

fn respond(session: Session, after: After, shutdown: CancellationToken) -> Response {
    let (to, mut outgoing) = mpsc::channel(OUTGOING);
    tokio::spawn(async move {
        let closed = to.clone();
        tokio::select! {
            () = session.run(after, &to) => {}
            () = closed.closed() => {}
            () = shutdown.cancelled() => {}
        }
    });
    let frames = stream::poll_fn(move |cx| {
        outgoing
            .poll_recv(cx)
            .map(|event: Option<Event>| event.map(Ok::<_, Infallible>))
    });
    // nginx would buffer the events otherwise.
    ([("x-accel-buffering", "no")], Sse::new(frames)).into_response()
}

/// One client.
struct Session {
    live: Live,
    news: Subscription,
    head: Option<Position>,
    filter: Filter,
    opening: Option<Change>,
    /// The one order that is followed is final: later events about it are repetitions.
    ended: bool,
    /// Released when the session ends.
    #[expect(dead_code, reason = "held, not read")]
    place: Place<Client>,
}

/// The client disconnected, or is too slow.
struct CutOff;

impl Session {
    async fn run(mut self, after: After, to: &mpsc::Sender<Event>) {
        // A client that was disconnected reconnects and resumes.
        let _: Result<(), CutOff> = self.tell(after, to).await;
    }

    async fn tell(&mut self, after: After, to: &mpsc::Sender<Event>) -> Result<(), CutOff> {
        let mut here = self.head;
        let hello = Event::default().retry(RECONNECT_AFTER).comment("orders");
        send(
            to,
            with_id(hello, here.filter(|_| matches!(after, After::Now))),
        )
        .await?;
        match after {
            After::Now => {}
            After::Unknown => self.reset(here, to).await?,
            After::Event(position) => here = self.catch_up(position, to).await?,
        }
        if let Some(opening) = self.opening.take() {
            self.ended = opening.is_final();
            let json = serde_json::to_string(&opening).expect("a change is plain data");
            send(
                to,
                with_id(Event::default().event("order").data(json), here),
            )
            .await?;
        }
        let mut heartbeat = tokio::time::interval_at(Instant::now() + HEARTBEAT, HEARTBEAT);
        loop {
            tokio::select! {
                news = self.news.next() => match news.as_deref() {
                    // Sent already, while catching up.
                    Some(News::Change(told)) if here.is_some_and(|here| told.position.sequence <= here.sequence) => {}
                    Some(News::Change(told)) => {
                        here = Some(told.position);
                        self.show(told, to).await?;
                    }
                    Some(News::Reset(position)) => {
                        here = Some(*position);
                        self.reset(here, to).await?;
                    }
                    None => return Err(CutOff),
                },
                _ = heartbeat.tick() => {
                    here = self.news.head_if_taken().filter(|head| here.is_none_or(|here| here.sequence <= head.sequence)).or(here);
                    send(to, with_id(Event::default().comment("heartbeat"), here)).await?;
                }
            }
        }
    }

    /// Reads missed events from the stream, until they reach the live events.
    async fn catch_up(
        &mut self,
        after: Position,
        to: &mpsc::Sender<Event>,
    ) -> Result<Option<Position>, CutOff> {
        let mut here = after;
        let mut heartbeat = tokio::time::interval_at(Instant::now() + HEARTBEAT, HEARTBEAT);
        loop {
            // For each page, so that the queue need not hold all events of a long replay.
            (self.news, self.head) = self.live.subscribe(self.filter.clone());
            let page = match self.head {
                Some(head) if head == here => return Ok(Some(here)),
                Some(head) if head.sequence.saturating_sub(here.sequence) > REPLAY_MAX => Ok(None),
                Some(_) => self.live.page_after(here, &self.filter).await,
                None => Err(anyhow::anyhow!("the broker was not reached yet")),
            };
            match page {
                Ok(Some((page, reached))) => {
                    for told in page {
                        self.show(&told, to).await?;
                    }
                    let joined = self
                        .head
                        .is_some_and(|head| reached.sequence >= head.sequence);
                    let stuck = reached == here;
                    here = reached;
                    if joined {
                        return Ok(Some(here));
                    }
                    // A replica of the stream that lags.
                    if stuck {
                        tokio::time::sleep(BROKER_RETRY_DELAY).await;
                    }
                }
                Ok(None) => {
                    self.reset(self.head, to).await?;
                    return Ok(self.head);
                }
                // The broker is unavailable: the client stays connected and waits.
                Err(_) => tokio::select! {
                    _ = heartbeat.tick() => send(to, with_id(Event::default().comment("heartbeat"), Some(here))).await?,
                    () = tokio::time::sleep(BROKER_RETRY_DELAY) => {}
                },
            }
        }
    }

    async fn show(&mut self, told: &StoredChange, to: &mpsc::Sender<Event>) -> Result<(), CutOff> {
        if self.ended {
            return Ok(());
        }
        self.ended = matches!(self.filter, Filter::Order(_)) && told.change.is_final();
        send(
            to,
            with_id(
                Event::default().event("order").data(&told.json),
                Some(told.position),
            ),
        )
        .await
    }

    async fn reset(&self, here: Option<Position>, to: &mpsc::Sender<Event>) -> Result<(), CutOff> {
        send(
            to,
            with_id(Event::default().event("reset").data("{}"), here),
        )
        .await
    }
}

fn with_id(event: Event, position: Option<Position>) -> Event {
    match position {
        Some(position) => event.id(position.to_string()),
        None => event,
    }
}

/// Waits for a client that reads slowly. The server disconnects one that reads nothing.
async fn send(to: &mpsc::Sender<Event>, event: Event) -> Result<(), CutOff> {
    to.send(event).await.map_err(|_| CutOff)
}
