//! Routes for operators, the same in every service: list and replay dead letters.

use std::sync::Arc;

use axum::Json;
use axum::extract::{FromRef, Path, State};
use broker::Broker;
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};
use service_kit::Problem;
use service_kit::input::{Cursor, PageLimit, PageQuery, ValidatedQuery};
use service_kit::problem::{Code, ProblemDocument};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use crate::ask_again::{Pending, PendingRequests};
use crate::backlog::{Backlog, ConsumerLag, MessageBacklog, OutboxBacklogWatch, consumer_lag};
use crate::database::Database;
use crate::dead_letters::replay::Replay;
use crate::dead_letters::view::DeadLetter;
use crate::retry::{Failure, read};
use crate::topology::Subscription;

/// The part of a service's state that these routes need.
#[derive(Clone)]
pub struct OperatorApi {
    pub(crate) db: Database,
    pub(crate) broker: Broker,
    pub(crate) outbox: OutboxBacklogWatch,
    pub(crate) pending_requests: PendingRequests,
    pub(crate) subscription: Option<Subscription>,
    pub(crate) replays: Arc<dyn Replays>,
}

/// Finds the subscriber of a dead letter and replays the letter.
pub(crate) trait Replays: Send + Sync {
    fn replay(
        &self,
        db: Database,
        id: Uuid,
        dry_run: bool,
    ) -> BoxFuture<'_, Result<Option<Replay>, Failure>>;
}

/// The state of a service's event flow.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = Flow)]
pub struct FlowStatus {
    #[serde(flatten)]
    pub backlog: Backlog,
    /// The consumer as the broker reports it; null while the broker is down.
    #[schema(required = true)]
    pub consumer: Option<ConsumerLag>,
}

impl OperatorApi {
    /// The routes for dead letters and their replay.
    pub fn routes<S>() -> OpenApiRouter<S>
    where
        Self: FromRef<S>,
        S: Clone + Send + Sync + 'static,
    {
        OpenApiRouter::new()
            .routes(routes!(list_dead_letters))
            .routes(routes!(replay_dead_letter))
    }

    /// The requests of this service without an answer, from its last scan. `None` if it failed.
    pub fn pending_requests(&self) -> Option<Pending> {
        self.pending_requests.get()
    }

    pub async fn flow_status(&self) -> Result<FlowStatus, Failure> {
        let backlog = Backlog {
            outbox: self.outbox.get().unwrap_or_default(),
            messages: read(|| MessageBacklog::read(&self.db)).await?,
        };
        let consumer = match self.subscription {
            Some(one) => consumer_lag(&self.broker, one.consumer, one.stream).await,
            None => None,
        };
        Ok(FlowStatus { backlog, consumer })
    }
}

/// A page of dead letters, newest first.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = DeadLetterList)]
pub(crate) struct DeadLetters {
    items: Vec<DeadLetter>,
    /// Cursor of the next page; null on the last one.
    #[schema(required = true)]
    next_cursor: Option<String>,
}

/// List messages that were not applied, newest first
#[utoipa::path(
    get,
    path = "/v1/ops/dead-letters",
    operation_id = "listDeadLetters",
    tag = "operators",
    params(PageQuery),
    responses(
        (status = 200, description = "A page", body = DeadLetters),
        (status = 422, description = "A parameter is not acceptable", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "The service cannot answer now; retry", body = ProblemDocument, content_type = "application/problem+json"),
    )
)]
async fn list_dead_letters(
    State(operators): State<OperatorApi>,
    ValidatedQuery(query): ValidatedQuery<PageQuery>,
) -> Result<Json<DeadLetters>, Problem> {
    let before = query.cursor.map(Cursor::id);
    let limit = PageLimit::or_default(query.limit);
    let mut rows = read(|| DeadLetter::page(&operators.db, before, limit as u64 + 1)).await?;
    let has_more = rows.len() > limit;
    rows.truncate(limit);
    let last = rows.last().filter(|_| has_more);
    Ok(Json(DeadLetters {
        next_cursor: last.map(|row| row.id.simple().to_string()),
        items: rows,
    }))
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct ReplayQuery {
    /// If true, only report what a replay would do.
    #[param(nullable = false)]
    dry_run: Option<bool>,
}

/// Apply a message again
///
/// The message goes through its usual handler, in one transaction. If it was already applied,
/// nothing changes. If it is refused again, it stays unresolved. With `dry_run`, everything is
/// rolled back, and the answer says what a replay would do.
#[utoipa::path(
    post,
    path = "/v1/ops/dead-letters/{id}/replay",
    operation_id = "replayDeadLetter",
    tag = "operators",
    params(
        ("id" = Uuid, Path, description = "Id of the dead letter"),
        ReplayQuery,
    ),
    responses(
        (status = 200, description = "What happened, or would happen", body = Replay),
        (status = 404, description = "There is no such dead letter", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 422, description = "A parameter is not acceptable", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "The service cannot answer now; retry", body = ProblemDocument, content_type = "application/problem+json"),
    )
)]
async fn replay_dead_letter(
    State(operators): State<OperatorApi>,
    Path(id): Path<String>,
    ValidatedQuery(query): ValidatedQuery<ReplayQuery>,
) -> Result<Json<Replay>, Problem> {
    let not_found = || Problem::from(Code::DeadLetterNotFound);
    let id: Uuid = id.parse().map_err(|_| not_found())?;
    let dry_run = query.dry_run.unwrap_or_default();
    let replayed = operators.replays.replay(operators.db.clone(), id, dry_run);
    replayed.await?.map(Json).ok_or_else(not_found)
}
