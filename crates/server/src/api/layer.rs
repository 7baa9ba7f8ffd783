//! What happens to every request: an id, one log line, one measurement, errors and panics as JSON.
//!
//! Neither headers nor bodies are logged: they hold keys, commands and environments.

use std::{panic::AssertUnwindSafe, time::Instant};

use axum::{
    extract::{MatchedPath, Request},
    http::{HeaderMap, HeaderName, HeaderValue, header},
    middleware::Next,
    response::Response,
};
use futures_util::FutureExt;

use crate::{
    error::{AppError, Failed, log_cause, to_http},
    metrics,
};

/// The header with the request's id, in requests and answers.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The longest id that is taken from a client.
const ID_CHARS: usize = 64;

/// The request's id, for handlers whose answer outlives them.
#[derive(Clone)]
pub(crate) struct RequestId(pub(crate) String);

/// Runs the request.
pub(crate) async fn every_request(mut request: Request, next: Next) -> Response {
    let began = Instant::now();
    let id = request_id(request.headers());
    request.extensions_mut().insert(RequestId(id.clone()));
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let route = request.extensions().get::<MatchedPath>().map(|route| route.as_str().to_owned());

    let outcome = AssertUnwindSafe(next.run(request)).catch_unwind().await;
    let response = outcome.unwrap_or_else(|panic| {
        let error = AppError::internal("a handler panicked", panic_text(&*panic));
        axum::response::IntoResponse::into_response(error)
    });
    let mut response = with_error_body(response, &id);
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    let (status, took) = (response.status().as_u16(), began.elapsed());
    // A method is the client's word too: only known ones become labels.
    let known_method = if is_known(method.as_str()) { method.as_str() } else { "other" };
    metrics::http(route.as_deref().unwrap_or("none"), known_method, status, took);
    let took_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
    tracing::info!(request_id = id, method = known_method, path, status, took_us, "{known_method} {path} {status}");
    response
}

/// Writes the body of an error that a handler or an extractor returned, keeping headers such as `Allow` and `RateLimit-Limit`.
fn with_error_body(response: Response, id: &str) -> Response {
    let Some(Failed(error)) = response.extensions().get::<Failed>().cloned() else { return response };
    log_cause(&error, id);
    let mut answer = to_http(&error, id);
    for (name, value) in response.headers() {
        if *name != header::CONTENT_LENGTH && *name != header::CONTENT_TYPE {
            answer.headers_mut().append(name, value.clone());
        }
    }
    answer
}

fn request_id(headers: &HeaderMap) -> String {
    let given = headers.get(REQUEST_ID).and_then(|value| value.to_str().ok());
    match given {
        Some(id) if (1..=ID_CHARS).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic()) => id.to_owned(),
        _ => new_id(),
    }
}

fn new_id() -> String {
    let bits: [u8; 10] = rand::random();
    format!("req-{}", hex::encode(bits))
}

fn is_known(method: &str) -> bool {
    ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"].contains(&method)
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into())
}
