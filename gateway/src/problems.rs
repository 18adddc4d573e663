//! A page for each problem code. The `type` of a problem document is the URL of its page.

use axum::Json;
use axum::extract::Path;
use axum::http::{HeaderMap, header};
use axum::response::{Html, IntoResponse as _, Response};
use serde::Serialize;
use service_kit::Problem;
use service_kit::input::NoParameters;
use service_kit::problem::{Code, ProblemDocument};
use utoipa::{OpenApi, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

#[derive(OpenApi)]
#[openapi(tags((name = "problems", description = "What the codes of errors mean")))]
struct Document;

pub(crate) fn api() -> OpenApiRouter {
    OpenApiRouter::with_openapi(Document::openapi()).routes(routes!(explain_problem))
}

/// What a problem code means.
#[derive(Serialize, ToSchema)]
#[schema(as = ProblemExplanation, example = json!({"code": "order_not_found", "title": "Order not found", "status": 404, "cause": "There is no order with this id.", "advice": "Check the id, or list the orders with GET /v1/orders."}))]
struct Explanation {
    code: Code,
    title: &'static str,
    /// HTTP status.
    status: u16,
    /// What is wrong.
    cause: &'static str,
    /// What to do.
    advice: &'static str,
}

/// What a problem code means
///
/// The `type` of each problem document points here. Returns a page for people, or JSON if the
/// request accepts `application/json`.
#[utoipa::path(
    get,
    path = "/problems/{code}",
    operation_id = "explainProblem",
    tag = "problems",
    params(("code" = Code, Path, description = "The `code` of a problem document", example = "order_not_found")),
    responses(
        (status = 200, description = "What is wrong, and what to do", content((String = "text/html"), (Explanation = "application/json"))),
        (status = 404, description = "There is no such code", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 422, description = "A parameter is not acceptable", body = ProblemDocument, content_type = "application/problem+json"),
    )
)]
async fn explain_problem(
    Path(code): Path<String>,
    _: NoParameters,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let code = Code::ALL
        .iter()
        .copied()
        .find(|known| known.as_str() == code)
        .ok_or(Code::NotFound)?;
    let explanation = Explanation {
        code,
        title: code.title(),
        status: code.status().as_u16(),
        cause: code.cause(),
        advice: code.advice(),
    };
    let wants_json = headers
        .get(header::ACCEPT)
        .and_then(|accept| accept.to_str().ok())
        .is_some_and(|accept| accept.contains("json"));
    Ok(if wants_json {
        Json(explanation).into_response()
    } else {
        page(&explanation)
    })
}

fn page(explanation: &Explanation) -> Response {
    let Explanation {
        code,
        title,
        status,
        cause,
        advice,
    } = explanation;
    // No escaping: the texts are constants without markup, as a test checks.
    let html = format!(
        "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n<title>{title} - Gozon</title>\n\
         <h1>{title}</h1>\n<p>Code <code>{}</code>, HTTP status {status}</p>\n\
         <h2>What is wrong</h2>\n<p>{cause}</p>\n<h2>What to do</h2>\n<p>{advice}</p>\n\
         <p><a href=\"/swagger/\">The API</a></p>\n</html>\n",
        code.as_str()
    );
    let policy = [(
        header::CONTENT_SECURITY_POLICY,
        "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    )];
    (policy, Html(html)).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_text_of_a_page_is_markup() {
        for code in Code::ALL {
            for text in [code.title(), code.cause(), code.advice()] {
                assert!(!text.contains(['<', '>', '&']), "{text}");
            }
        }
    }
}
