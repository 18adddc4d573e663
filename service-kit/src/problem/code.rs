//! All problem codes of the API. There is one list, because the gateway documents the codes of all
//! services.

use axum::http::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;

macro_rules! codes {
    ($($code:ident $text:literal $status:ident $title:literal: $cause:literal $advice:literal,)*) => {
        /// The kind of problem, for programs.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
        #[serde(rename_all = "snake_case")]
        #[schema(as = ProblemCode)]
        pub enum Code {
            $($code,)*
        }

        impl Code {
            pub const ALL: &[Self] = &[$(Self::$code,)*];

            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$code => $text,)* }
            }

            pub const fn status(self) -> StatusCode {
                match self { $(Self::$code => StatusCode::$status,)* }
            }

            pub const fn title(self) -> &'static str {
                match self { $(Self::$code => $title,)* }
            }

            /// What is wrong, in one sentence. A problem may replace it with a more exact one.
            pub const fn cause(self) -> &'static str {
                match self { $(Self::$code => $cause,)* }
            }

            /// What the client can do, in one sentence.
            pub const fn advice(self) -> &'static str {
                match self { $(Self::$code => $advice,)* }
            }
        }
    };
}

codes! {
    MalformedJson "malformed_json" BAD_REQUEST "Malformed JSON":
        "The body is not JSON."
        "Send one JSON object.",
    UnreadableBody "unreadable_body" BAD_REQUEST "Unreadable body":
        "The body ended before it was complete, or it is not framed as HTTP requires."
        "Send the request again.",
    IdempotencyKeyMalformed "idempotency_key_malformed" BAD_REQUEST "Idempotency key malformed":
        "The Idempotency-Key is malformed, or it is given more than once."
        "Send one Idempotency-Key of 1 to 255 printable ASCII characters, bare or in double quotes, \
         such as a UUID; the key itself may not begin with a double quote, nor begin or end with a \
         space.",
    BadRequest "bad_request" BAD_REQUEST "Bad request":
        "The server cannot read the request."
        "Compare the request with /openapi.json.",
    AccountNotFound "account_not_found" NOT_FOUND "Account not found":
        "This user has no account."
        "Create the account with POST /v1/accounts.",
    OrderNotFound "order_not_found" NOT_FOUND "Order not found":
        "There is no order with this id."
        "Check the id, or list the orders with GET /v1/orders.",
    DeadLetterNotFound "dead_letter_not_found" NOT_FOUND "Dead letter not found":
        "There is no dead letter with this id."
        "Check the id, or list the dead letters with GET /v1/ops/dead-letters.",
    NotFound "not_found" NOT_FOUND "Not found":
        "There is nothing at this path."
        "Find the paths in /openapi.json.",
    MethodNotAllowed "method_not_allowed" METHOD_NOT_ALLOWED "Method not allowed":
        "This path does not support the method."
        "Use a method that the header Allow names.",
    RequestTimeout "request_timeout" REQUEST_TIMEOUT "Request timeout":
        "The body was not complete in time."
        "Send the request again.",
    AccountAlreadyExists "account_already_exists" CONFLICT "Account already exists":
        "This user already has an account."
        "Read the account with GET /v1/accounts/{user_id}, or choose another user_id.",
    RequestInProgress "request_in_progress" CONFLICT "Request in progress":
        "Another request with this Idempotency-Key is still being stored."
        "Wait as long as Retry-After says, then send the request again with the same key.",
    BodyTooLarge "body_too_large" PAYLOAD_TOO_LARGE "Body too large":
        "The body is too large."
        "Send a smaller body.",
    UrlTooLong "url_too_long" URI_TOO_LONG "URL too long":
        "Path and query are too long."
        "Send a shorter URL.",
    UnsupportedMediaType "unsupported_media_type" UNSUPPORTED_MEDIA_TYPE "Unsupported media type":
        "The body is not JSON in UTF-8, or it is compressed."
        "Send uncompressed JSON with the header Content-Type: application/json.",
    ValidationFailed "validation_failed" UNPROCESSABLE_ENTITY "Validation failed":
        "Parts of the request are not acceptable."
        "Correct the parts that are listed in errors, and send the request again.",
    IdempotencyKeyReused "idempotency_key_reused" UNPROCESSABLE_ENTITY "Idempotency key reused":
        "This Idempotency-Key was used for a request with other content."
        "Use a new key for a new request.",
    BalanceLimitExceeded "balance_limit_exceeded" UNPROCESSABLE_ENTITY "Balance limit exceeded":
        "The balance would exceed its limit."
        "Deposit less.",
    RateLimited "rate_limited" TOO_MANY_REQUESTS "Rate limited":
        "Too many requests came from your address or for this user, so this one was not executed."
        "Wait as long as Retry-After says, then send the request again.",
    InternalError "internal_error" INTERNAL_SERVER_ERROR "Internal error":
        "Something went wrong on our side."
        "Send the request again with the same Idempotency-Key, and report the request_id if it \
         fails again.",
    ServiceUnavailable "service_unavailable" SERVICE_UNAVAILABLE "Service unavailable":
        "A service is temporarily unavailable."
        "Wait as long as Retry-After says, then send the request again with the same \
         Idempotency-Key.",
    Overloaded "overloaded" SERVICE_UNAVAILABLE "Overloaded":
        "There are more requests than can be handled, so this one was not executed."
        "Wait as long as Retry-After says, then send the request again with the same \
         Idempotency-Key.",
    NoLiveEvents "no_live_events" SERVICE_UNAVAILABLE "No live events":
        "This gateway was started without NATS_PASSWORD, so it has no live events."
        "Poll GET /v1/orders instead.",
    NotReady "not_ready" SERVICE_UNAVAILABLE "Not ready":
        "The process is not ready."
        "Send it no requests until /readyz answers 200.",
    RequestRefused "request_refused" BAD_REQUEST "Request refused":
        "The server does not accept the request."
        "Compare the request with /openapi.json.",
}
