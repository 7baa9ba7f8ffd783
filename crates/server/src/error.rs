//! The one error of the application, and its one translation to HTTP.
//!
//! Invariant: what happened inside is logged once, here, with its cause, and never sent to the client.

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use serde_json::{Value, json};
use tiffin_engine::EngineError;
use tiffin_store::{QuotaExceeded, StoreError};
use tiffin_types::{
    account::Scope,
    id::Digest,
    vm::{EndReason, EndReport},
};
use utoipa::ToSchema;

/// Why a request was not done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AppError {
    /// Fields of the request are wrong; all of them are listed.
    #[error("{}", summary(.0))]
    Fields(Vec<FieldError>),
    /// The request can't be read.
    #[error("{0}")]
    BadRequest(String),
    /// No key, or one that isn't valid.
    #[error("{0}")]
    Unauthorized(&'static str),
    /// The key lacks a scope.
    #[error("this key or user lacks the scope {}: use one that has it", .0.as_str())]
    Forbidden(Scope),
    /// A session's cookie came along with a request that no page of this server made.
    #[error(
        "a request with a session's cookie that changes something must come from a page of this server: send an Origin header of this server, or use an API key"
    )]
    Csrf,
    /// There is no such thing, or it is somebody else's.
    #[error("{0} not found")]
    NotFound(&'static str),
    /// No such route.
    #[error("no such route: /swagger lists every one")]
    NoRoute,
    /// The route exists, not with this method.
    #[error("this route doesn't take this method: the Allow header lists those it takes")]
    MethodNotAllowed,
    /// The client is too slow.
    #[error("the body didn't arrive in time")]
    BodyTimeout,
    /// What the client sends comes too slowly; says how slowly.
    #[error("{0}")]
    TooSlow(String),
    /// The file that came isn't the one that the client meant.
    #[error(
        "the file that came has the digest {found}, and the request's head says {wanted}: nothing of it is kept, upload it anew"
    )]
    DigestMismatch {
        /// What the client said.
        wanted: Digest,
        /// What came.
        found: Digest,
    },
    /// The thing is not in a state for that.
    #[error("{message}")]
    Conflict {
        /// What kind of conflict.
        code: &'static str,
        /// Names the state.
        message: String,
        /// More.
        details: Value,
    },
    /// The body is too large.
    #[error("the body is larger than {0} bytes, the most that is taken")]
    TooLarge(usize),
    /// Something else is over its limit; says what and which.
    #[error("{0}")]
    OverLimit(String),
    /// The body is of the wrong type.
    #[error("the body must be {what}: send Content-Type: {types}")]
    MediaType {
        /// What it must be.
        what: &'static str,
        /// How that is said in the header.
        types: &'static str,
    },
    /// The archive breaks a rule; says which.
    #[error("the archive is refused, and nothing of it was written: {0}")]
    BadArchive(String),
    /// There is no such file in the VM.
    #[error("{0}")]
    FileNotFound(String),
    /// Moving files took too long.
    #[error("moving the files took longer than the server lets it take; move fewer at once")]
    FilesTimeout,
    /// The connection was to become a WebSocket and can't.
    #[error("{0}")]
    NoUpgrade(String),
    /// Understood, but it can't be done.
    #[error("{message}")]
    Unprocessable {
        /// Why.
        code: &'static str,
        /// For a person.
        message: String,
    },
    /// The account has no room.
    #[error("over the account's quota of {} {}: {} in use, {} asked for; delete or stop VMs, or ask for a larger quota", .0.limit, .0.what, .0.used, .0.asked)]
    OverQuota(QuotaExceeded),
    /// Too much at once of something that is bounded per VM.
    #[error("{0}")]
    TooMany(String),
    /// Too often of something that is bounded per caller or address and minute.
    #[error("too many requests: {what} at most {per_minute} times a minute; try again in {retry_s} s")]
    RateLimited {
        /// What is bounded.
        what: &'static str,
        /// How often it may be done.
        per_minute: u32,
        /// When it may be done again.
        retry_s: u32,
    },
    /// The answer didn't begin in time.
    #[error("this took longer than the server lets it take; try again later")]
    TimedOut,
    /// Not now.
    #[error("{message}")]
    Unavailable {
        /// Why.
        code: &'static str,
        /// For a person.
        message: String,
    },
    /// The database doesn't answer, or not in time.
    #[error("the database doesn't answer; try again later")]
    Store(#[source] Cause),
    /// The VM came up wrongly.
    #[error("the VM did not come up: {}", .0.message)]
    Boot(EndReport),
    /// The agent in the guest didn't keep to the time limit.
    #[error("the VM's agent didn't answer in time; the command was abandoned")]
    AgentTimeout,
    /// The agent in the guest failed or broke its protocol.
    #[error("the VM's agent failed")]
    Agent(#[source] Cause),
    /// Something inside failed.
    #[error("internal error")]
    Internal {
        /// What was being done.
        context: String,
        /// What failed.
        #[source]
        source: Cause,
    },
}

/// Whatever failed underneath.
pub(crate) type Cause = Box<dyn std::error::Error + Send + Sync>;

/// What is wrong with one field.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct FieldError {
    /// The field's name; a list's entry as `allowIps[2]`.
    #[schema(example = "cpu")]
    pub(crate) field: String,
    /// What it must be.
    #[schema(example = "must be a whole number from 1 to 8")]
    pub(crate) message: String,
}

/// Every error's body.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ErrorBody {
    /// What is wrong and what to do; stands alone.
    #[schema(example = "VM not found")]
    message: String,
    /// The kind of error, for programs.
    #[schema(example = "not_found")]
    code: String,
    /// The request's id, as in the header `x-request-id` and the server's log.
    #[schema(example = "01JD4W5C1Q0000000000000000")]
    request_id: String,
    /// More, by kind: `fields` for `invalid_parameter`, `state` for `wrong_state`, figures for `quota_exceeded`.
    #[serde(skip_serializing_if = "Value::is_null")]
    #[schema(value_type = Option<Object>)]
    details: Value,
}

impl AppError {
    /// One field is wrong.
    pub(crate) fn field(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Fields(vec![FieldError { field: field.into(), message: message.into() }])
    }

    /// An `Idempotency-Key` that belongs to another request.
    pub(crate) fn key_reused() -> Self {
        Self::Unprocessable {
            code: "idempotency_key_reused",
            message: "this Idempotency-Key was used for another request: use a new key for a new request".into(),
        }
    }

    /// What happened, for the log: with the inside that the client doesn't get to see.
    pub(crate) fn inside(&self) -> String {
        match self {
            Self::Internal { context, source } => format!("{context}: {}", chain(&**source)),
            other => chain(other),
        }
    }

    /// Something inside failed while doing `context`.
    pub(crate) fn internal(context: impl Into<String>, source: impl Into<Cause>) -> Self {
        Self::Internal { context: context.into(), source: source.into() }
    }
}

impl From<StoreError> for AppError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Unavailable { source } => Self::Store(source),
            StoreError::Conflict(_) | StoreError::Corrupt(_) => Self::internal("using the store", error),
        }
    }
}

impl From<EngineError> for AppError {
    fn from(error: EngineError) -> Self {
        match error {
            EngineError::Absent => Self::NotFound("VM"),
            EngineError::WrongState(state) => {
                Self::Conflict { code: "wrong_state", message: format!("the VM is {state}"), details: Value::Null }
            }
            EngineError::NoCapacity(what) => Self::Unavailable {
                code: "no_capacity",
                message: format!("the host has no room: {what}; try again later"),
            },
            EngineError::Ended(report) => Self::Boot(report),
            EngineError::Unsupported { engine, what } => {
                Self::Unprocessable { code: "unsupported", message: format!("the engine {engine} can't {what}") }
            }
            EngineError::Invalid(message) => Self::Unprocessable { code: "invalid_for_engine", message },
            EngineError::BadSnapshot(message) => Self::Unprocessable { code: "bad_snapshot", message },
            EngineError::Host { context, source } => Self::Internal { context, source },
        }
    }
}

fn summary(fields: &[FieldError]) -> String {
    match fields {
        [] => "invalid request".into(),
        [only] => format!("{} {}", only.field, only.message),
        [first, rest @ ..] => {
            format!("{} {} (and {} more, see details.fields)", first.field, first.message, rest.len())
        }
    }
}

/// Seconds after which trying again makes sense, for the header `Retry-After`.
fn retry_after(error: &AppError) -> Option<u32> {
    match error {
        AppError::Unavailable { .. } | AppError::Store(_) => Some(5),
        AppError::OverQuota(_) => Some(30),
        AppError::TooMany(_) => Some(1),
        AppError::RateLimited { retry_s, .. } => Some(*retry_s),
        AppError::TimedOut => Some(5),
        _ => None,
    }
}

/// Status, code and details of an error.
fn describe(error: &AppError) -> (StatusCode, &str, Value) {
    match error {
        AppError::Fields(fields) => (StatusCode::BAD_REQUEST, "invalid_parameter", json!({ "fields": fields })),
        AppError::BadRequest(_) => (StatusCode::BAD_REQUEST, "bad_request", Value::Null),
        AppError::Unauthorized(_) => (StatusCode::UNAUTHORIZED, "unauthorized", Value::Null),
        AppError::Forbidden(scope) => (StatusCode::FORBIDDEN, "forbidden", json!({ "scope": scope })),
        AppError::Csrf => (StatusCode::FORBIDDEN, "csrf", Value::Null),
        AppError::NotFound(_) => (StatusCode::NOT_FOUND, "not_found", Value::Null),
        AppError::NoRoute => (StatusCode::NOT_FOUND, "no_such_route", Value::Null),
        AppError::MethodNotAllowed => (StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", Value::Null),
        AppError::BodyTimeout => (StatusCode::REQUEST_TIMEOUT, "body_timeout", Value::Null),
        AppError::TooSlow(_) => (StatusCode::REQUEST_TIMEOUT, "too_slow", Value::Null),
        AppError::DigestMismatch { .. } => (StatusCode::BAD_REQUEST, "digest_mismatch", Value::Null),
        AppError::Conflict { code, details, .. } => (StatusCode::CONFLICT, code, details.clone()),
        AppError::TooLarge(limit) => (StatusCode::PAYLOAD_TOO_LARGE, "too_large", json!({ "limitBytes": limit })),
        AppError::OverLimit(_) => (StatusCode::PAYLOAD_TOO_LARGE, "too_large", Value::Null),
        AppError::MediaType { .. } => (StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", Value::Null),
        AppError::BadArchive(_) => (StatusCode::BAD_REQUEST, "bad_archive", Value::Null),
        AppError::FileNotFound(_) => (StatusCode::NOT_FOUND, "file_not_found", Value::Null),
        AppError::FilesTimeout => (StatusCode::GATEWAY_TIMEOUT, "files_timeout", Value::Null),
        AppError::NoUpgrade(_) => (StatusCode::UPGRADE_REQUIRED, "upgrade_required", Value::Null),
        AppError::Unprocessable { code, .. } => (StatusCode::UNPROCESSABLE_ENTITY, code, Value::Null),
        AppError::OverQuota(over) => (
            StatusCode::TOO_MANY_REQUESTS,
            "quota_exceeded",
            json!({ "what": over.what, "limit": over.limit, "used": over.used, "asked": over.asked }),
        ),
        AppError::TooMany(_) => (StatusCode::TOO_MANY_REQUESTS, "too_many", Value::Null),
        AppError::RateLimited { per_minute, .. } => {
            (StatusCode::TOO_MANY_REQUESTS, "rate_limited", json!({ "perMinute": per_minute }))
        }
        AppError::TimedOut => (StatusCode::SERVICE_UNAVAILABLE, "timed_out", Value::Null),
        AppError::Unavailable { code, .. } => (StatusCode::SERVICE_UNAVAILABLE, code, Value::Null),
        AppError::Store(_) => (StatusCode::SERVICE_UNAVAILABLE, "store_unavailable", Value::Null),
        AppError::Boot(report) if matches!(report.reason, EndReason::Oom | EndReason::ProgramFailed) => {
            (StatusCode::UNPROCESSABLE_ENTITY, report.reason.as_str(), Value::Null)
        }
        AppError::Boot(report) => (StatusCode::INTERNAL_SERVER_ERROR, report.reason.as_str(), Value::Null),
        AppError::AgentTimeout => (StatusCode::GATEWAY_TIMEOUT, "agent_timeout", Value::Null),
        AppError::Agent(_) => (StatusCode::BAD_GATEWAY, "agent_failed", Value::Null),
        AppError::Internal { .. } => (StatusCode::INTERNAL_SERVER_ERROR, "internal", Value::Null),
    }
}

/// The error as JSON text for a client: its code and its message.
pub(crate) fn to_event(error: &AppError) -> (&str, String) {
    let (_, code, _) = describe(error);
    (code, error.to_string())
}

/// Logs what the client doesn't get to see.
pub(crate) fn log_cause(error: &AppError, request_id: &str) {
    match error {
        AppError::Internal { context, source } => {
            tracing::error!(request_id, error = chain(&**source), "request failed: {context}");
        }
        AppError::Agent(source) => tracing::warn!(request_id, error = chain(&**source), "agent failed"),
        AppError::Boot(report) => {
            tracing::warn!(request_id, reason = report.reason.as_str(), "VM did not come up: {}", report.message);
        }
        _ => {}
    }
}

/// An error's text and its sources'.
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// The error as HTTP. The only place where one becomes the other.
pub(crate) fn to_http(error: &AppError, request_id: &str) -> Response {
    let (status, code, details) = describe(error);
    let body =
        ErrorBody { message: error.to_string(), code: code.to_owned(), request_id: request_id.to_owned(), details };
    let mut response = (status, Json(body)).into_response();
    if let Some(seconds) = retry_after(error) {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}

/// An error on its way to the layer that knows the request's id and calls [`to_http`].
#[derive(Clone)]
pub(crate) struct Failed(pub(crate) std::sync::Arc<AppError>);

impl IntoResponse for AppError {
    fn into_response(self) -> Response {
        let (status, _, _) = describe(&self);
        let mut response = status.into_response();
        response.extensions_mut().insert(Failed(std::sync::Arc::new(self)));
        response
    }
}
