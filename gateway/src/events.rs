//! Streams changes of orders to clients as server-sent events.

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
use service_kit::problem::{Code, ProblemDocument};
use service_kit::slots::Slot;
use shared_contracts::{OrderId, UserId};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use utoipa::{IntoParams, OpenApi};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::change::{Change, Position, StoredChange};
use crate::client::Client;
use crate::forward::{Forwarder, trace_of};
use crate::limits::Limits;
use crate::listeners::{Filter, Notification};
use crate::live::{Live, REPLAY_MAX, Subscription};
use crate::service::Service;

const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
/// Interval of heartbeats. They keep proxies from closing a quiet connection, and tell the client
/// its position.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// Number of events that are buffered for one client.
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
    /// `live` is `None` if no broker is configured.
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

    fn open(&self, client: Client) -> Result<(Live, Slot<Client>), Problem> {
        let Some(live) = self.live.clone() else {
            return Err(Code::NoLiveEvents.into());
        };
        Ok((live, self.limits.event_stream_slot(client)?))
    }
}

/// In OpenAPI 3.1 an event stream can only be a string. `x-event-data` names the schema of the
/// events' data.
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
    /// Only orders of this user; orders of all users if absent
    #[param(inline, nullable = false)]
    user_id: Option<UserId>,
    /// Like the header Last-Event-ID, for clients that cannot set it; the header takes precedence
    #[param(value_type = Option<String>, nullable = false)]
    last_event_id: Option<LastEventId>,
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct FollowOrderQuery {
    /// Like the header Last-Event-ID, for clients that cannot set it; the header takes precedence
    #[param(value_type = Option<String>, nullable = false)]
    last_event_id: Option<LastEventId>,
}

/// `None` for an empty id: a browser's EventSource has an empty id before the first event.
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
/// Server-sent events. An `order` event has an OrderChange as its data: an order is now NEW,
/// FINISHED or CANCELLED. After a `reset` event, events may be missing: read the orders again. To
/// resume after an event, send its id as Last-Event-ID, to this gateway or another one; browsers do
/// this automatically. Ids are opaque. Comments keep the connection alive. In the stream, the
/// status of an order never goes backwards. But an event may be older than a list that you have
/// read, so keep a final status.
#[utoipa::path(
    get,
    path = "/v1/orders/events",
    operation_id = "followOrders",
    tag = "orders",
    extensions(("x-event-data" = json!({"$ref": "#/components/schemas/OrderChange"}))),
    params(
        FollowOrdersQuery,
        ("Last-Event-ID" = Option<String>, Header, description = "Resume after this event", nullable = false),
    ),
    responses(
        (status = 200, description = "Events, until one side closes the connection", body = String, content_type = "text/event-stream", example = example),
        (status = 422, description = "A parameter is not acceptable", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "Too many clients follow events, or live events are disabled", body = ProblemDocument, content_type = "application/problem+json"),
    )
)]
async fn follow_orders(
    State(events): State<Events>,
    Extension(client): Extension<Client>,
    ValidatedQuery(query): ValidatedQuery<FollowOrdersQuery>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let (live, slot) = events.open(client)?;
    let filter = query.user_id.map_or(Filter::All, Filter::User);
    let (subscription, head) = live.subscribe(filter.clone());
    let after = resume_after(query.last_event_id, &headers).unwrap_or(After::Now);
    Ok(respond(
        Session {
            live,
            subscription,
            head,
            filter,
            opening: None,
            is_final: false,
            slot,
        },
        after,
        events.shutdown,
    ))
}

/// Follow one order
///
/// Like the stream of all orders. Without Last-Event-ID it starts with the current state of the
/// order, or with `reset` if the state is unknown.
#[utoipa::path(
    get,
    path = "/v1/orders/{id}/events",
    operation_id = "followOrder",
    tag = "orders",
    extensions(("x-event-data" = json!({"$ref": "#/components/schemas/OrderChange"}))),
    params(
        ("id" = Uuid, Path, description = "Id of the order"),
        FollowOrderQuery,
        ("Last-Event-ID" = Option<String>, Header, description = "Resume after this event", nullable = false),
    ),
    responses(
        (status = 200, description = "Events, until one side closes the connection", body = String, content_type = "text/event-stream", example = example),
        (status = 404, description = "There is no such order", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 422, description = "A parameter is not acceptable", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "Too many clients follow events, or live events are disabled", body = ProblemDocument, content_type = "application/problem+json"),
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
    let (live, slot) = events.open(client)?;
    // Subscribes before reading the order, so that no change in between is missed.
    let filter = Filter::Order(order_id);
    let (subscription, head) = live.subscribe(filter.clone());
    let found = current_order(&events.forwarder, client, order_id, &headers).await;
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
            subscription,
            head,
            filter,
            opening,
            is_final: false,
            slot,
        },
        after,
        events.shutdown,
    ))
}

/// Where the event stream starts.
#[derive(Clone, Copy, Debug)]
enum After {
    Now,
    Event(Position),
    /// After an unknown event: the client must read its orders again.
    Unknown,
}

/// The header takes precedence over the parameter: a browser sets the header when it reconnects, so
/// it is newer than the URL.
fn resume_after(parameter: Option<LastEventId>, headers: &HeaderMap) -> Option<After> {
    let header = headers
        .get(LAST_EVENT_ID)
        .map(HeaderValue::to_str)
        .filter(|value| !matches!(value, Ok("")));
    match header {
        // An invalid id is not rejected, because then a browser would never reconnect.
        Some(id) => Some(
            id.ok()
                .and_then(|id| id.parse().ok())
                .map_or(After::Unknown, After::Event),
        ),
        None => parameter.and_then(|LastEventId(position)| position.map(After::Event)),
    }
}

/// Reads the order from its service. `None` if the service is unavailable. Returns a 404 response
/// as the error.
async fn current_order(
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
    // Otherwise nginx would buffer the events.
    ([("x-accel-buffering", "no")], Sse::new(frames)).into_response()
}

/// The event stream of one client.
struct Session {
    live: Live,
    subscription: Subscription,
    head: Option<Position>,
    filter: Filter,
    opening: Option<Change>,
    /// Whether the followed order is final. Later events about it are repetitions. Always false for
    /// a stream of many orders.
    is_final: bool,
    /// Held while the session lasts.
    #[expect(dead_code, reason = "released when dropped, never read")]
    slot: Slot<Client>,
}

/// The client has disconnected, or it was too slow.
struct Disconnected;

impl Session {
    async fn run(mut self, after: After, to: &mpsc::Sender<Event>) {
        // Nothing to do on an error: the client reconnects and resumes.
        let _: Result<(), Disconnected> = self.stream(after, to).await;
    }

    async fn stream(&mut self, after: After, to: &mpsc::Sender<Event>) -> Result<(), Disconnected> {
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
            self.is_final = opening.is_final();
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
                next = self.subscription.next() => match next.as_deref() {
                    // Already sent while catching up.
                    Some(Notification::Change(stored)) if here.is_some_and(|here| stored.position.sequence <= here.sequence) => {}
                    Some(Notification::Change(stored)) => {
                        here = Some(stored.position);
                        self.send_change(stored, to).await?;
                    }
                    Some(Notification::Reset(position)) => {
                        here = Some(*position);
                        self.reset(here, to).await?;
                    }
                    None => return Err(Disconnected),
                },
                _ = heartbeat.tick() => {
                    here = self.subscription.head_if_caught_up().filter(|head| here.is_none_or(|here| here.sequence <= head.sequence)).or(here);
                    send(to, with_id(Event::default().comment("heartbeat"), here)).await?;
                }
            }
        }
    }

    /// Sends missed events from the broker's stream, until the live events follow without a gap.
    async fn catch_up(
        &mut self,
        after: Position,
        to: &mpsc::Sender<Event>,
    ) -> Result<Option<Position>, Disconnected> {
        let mut here = after;
        let mut heartbeat = tokio::time::interval_at(Instant::now() + HEARTBEAT, HEARTBEAT);
        loop {
            // Subscribes again for each page, so that the queue need not hold the events of a long
            // replay.
            (self.subscription, self.head) = self.live.subscribe(self.filter.clone());
            let page = match self.head {
                Some(head) if head == here => return Ok(Some(here)),
                Some(head) if head.sequence.saturating_sub(here.sequence) > REPLAY_MAX => Ok(None),
                Some(_) => self.live.page_after(here, &self.filter).await,
                None => Err(anyhow::anyhow!("the broker has not been reached yet")),
            };
            match page {
                Ok(Some((page, reached))) => {
                    for stored in page {
                        self.send_change(&stored, to).await?;
                    }
                    let joined = self
                        .head
                        .is_some_and(|head| reached.sequence >= head.sequence);
                    let stuck = reached == here;
                    here = reached;
                    if joined {
                        return Ok(Some(here));
                    }
                    // The stream replica that answered lags behind.
                    if stuck {
                        tokio::time::sleep(BROKER_RETRY_DELAY).await;
                    }
                }
                Ok(None) => {
                    self.reset(self.head, to).await?;
                    return Ok(self.head);
                }
                // The broker is unavailable. The client stays connected until it is back.
                Err(_) => tokio::select! {
                    _ = heartbeat.tick() => send(to, with_id(Event::default().comment("heartbeat"), Some(here))).await?,
                    () = tokio::time::sleep(BROKER_RETRY_DELAY) => {}
                },
            }
        }
    }

    async fn send_change(
        &mut self,
        stored: &StoredChange,
        to: &mpsc::Sender<Event>,
    ) -> Result<(), Disconnected> {
        if self.is_final {
            return Ok(());
        }
        self.is_final = matches!(self.filter, Filter::Order(_)) && stored.change.is_final();
        send(
            to,
            with_id(
                Event::default().event("order").data(&stored.json),
                Some(stored.position),
            ),
        )
        .await
    }

    async fn reset(
        &self,
        here: Option<Position>,
        to: &mpsc::Sender<Event>,
    ) -> Result<(), Disconnected> {
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

/// Waits if the client reads slowly. The server disconnects a client that reads nothing.
async fn send(to: &mpsc::Sender<Event>, event: Event) -> Result<(), Disconnected> {
    to.send(event).await.map_err(|_| Disconnected)
}
