//! What stands before every operation of the API: who calls, from which page, and how often.
//!
//! Invariant: it knows operations by the OpenAPI document alone, by route and method, so that none can be added without
//! passing here. Handlers take the [`Caller`] that it has found.

use std::{collections::HashMap, sync::Arc};

use axum::{
    extract::{FromRequestParts, MatchedPath, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use utoipa::openapi::OpenApi;

use super::sessions::{Origin, origin};
use crate::{
    app::{
        App,
        auth::{Actor, Caller},
        rates::{Limited, Standing},
    },
    error::AppError,
};

const LIMIT: HeaderName = HeaderName::from_static("ratelimit-limit");
const REMAINING: HeaderName = HeaderName::from_static("ratelimit-remaining");
const RESET: HeaderName = HeaderName::from_static("ratelimit-reset");

/// What is known of an operation.
#[derive(Debug)]
struct Operation {
    /// Whether it needs a caller.
    guarded: bool,
    /// Whether it changes something.
    unsafe_: bool,
    limited: Option<Limited>,
    /// Whether its answer begins within the time that any operation may take; what runs in VMs or brings them up has
    /// limits of its own.
    is_quick: bool,
}

/// Every operation, by route and method.
pub(super) struct Gate {
    app: Arc<App>,
    operations: HashMap<(String, Method), Operation>,
}

impl Gate {
    /// The gate before the operations of that document.
    pub(super) fn new(app: Arc<App>, document: &OpenApi) -> Self {
        let mut operations = HashMap::new();
        for (route, item) in &document.paths.paths {
            let methods = [
                (Method::GET, &item.get),
                (Method::POST, &item.post),
                (Method::PUT, &item.put),
                (Method::PATCH, &item.patch),
                (Method::DELETE, &item.delete),
            ];
            for (method, _) in methods.into_iter().filter(|(_, operation)| operation.is_some()) {
                operations.insert((route.clone(), method.clone()), Operation::new(route, &method));
            }
        }
        Self { app, operations }
    }

    fn operation(&self, request: &Request) -> Option<&Operation> {
        let route = request.extensions().get::<MatchedPath>()?.as_str().to_owned();
        let method = if request.method() == Method::HEAD { Method::GET } else { request.method().clone() };
        self.operations.get(&(route, method))
    }
}

impl Operation {
    fn new(route: &str, method: &Method) -> Self {
        let limited = limited(method, route);
        let is_quick = limited.is_none()
            && (*method == Method::GET || route.starts_with("/v1/admin/") || route.starts_with("/auth/"));
        Self { guarded: is_guarded(route), unsafe_: *method != Method::GET, limited, is_quick }
    }
}

/// Whether operations of that route need a caller.
pub(super) fn is_guarded(route: &str) -> bool {
    route.starts_with("/v1/") || route == "/auth/me"
}

/// The contract's limits. Routes that are not served yet are limited once they are.
fn limited(method: &Method, route: &str) -> Option<Limited> {
    match (method.as_str(), route) {
        // A fork makes VMs too, several at once.
        ("POST", "/v1/vms" | "/v1/vms/{id}/fork") => Some(Limited::VmCreate),
        ("POST", "/v1/vms/{id}/exec") => Some(Limited::Exec),
        ("POST", "/v1/vms/{id}/run-ts" | "/v1/vms/{id}/run-js") => Some(Limited::Run),
        ("POST", "/v1/vms/{id}/files/upload") => Some(Limited::Upload),
        ("GET", "/v1/vms/{id}/files/download") => Some(Limited::Download),
        _ => None,
    }
}

/// Lets a request through, or not.
pub(super) async fn pass(State(gate): State<Arc<Gate>>, request: Request, next: Next) -> Response {
    // Pages, unknown routes and methods are answered without knowing who asks.
    let Some(operation) = gate.operation(&request) else { return next.run(request).await };
    if !operation.guarded {
        // Another site's page must not log anybody in or out either.
        let foreign = operation.unsafe_ && origin(request.headers()) == Origin::Foreign;
        return if foreign { AppError::Csrf.into_response() } else { run(&gate.app, operation, request, next).await };
    }
    let (mut parts, body) = request.into_parts();
    let caller = match Caller::from_request_parts(&mut parts, &gate.app).await {
        Ok(caller) => caller,
        Err(error) => return error.into_response(),
    };
    if let Err(error) = same_origin(operation, &caller, &parts.headers) {
        return error.into_response();
    }
    let standing = operation.limited.and_then(|what| Some((what, gate.app.rates.take(what, caller.actor.id())?)));
    parts.extensions.insert(caller);
    let request = Request::from_parts(parts, body);
    let mut response = match standing {
        Some((what, standing)) if !standing.allowed => standing.refusal(what.name()).into_response(),
        Some(_) | None => run(&gate.app, operation, request, next).await,
    };
    if let Some((_, standing)) = standing {
        tell(standing, response.headers_mut());
    }
    response
}

/// A browser sends its cookie with whatever any page makes it send: what changes something, or opens a terminal, must say
/// that it comes from a page of this server. Keys are sent by nobody unknowingly.
fn same_origin(operation: &Operation, caller: &Caller, headers: &HeaderMap) -> Result<(), AppError> {
    let guarded = operation.unsafe_ || headers.contains_key(header::UPGRADE);
    match caller.actor {
        Actor::User { .. } if guarded && origin(headers) != Origin::Own => Err(AppError::Csrf),
        Actor::User { .. } | Actor::Key { .. } => Ok(()),
    }
}

async fn run(app: &App, operation: &Operation, request: Request, next: Next) -> Response {
    if !operation.is_quick {
        return next.run(request).await;
    }
    let answer = tokio::time::timeout(app.config.http.request_timeout, next.run(request)).await;
    answer.unwrap_or_else(|_| AppError::TimedOut.into_response())
}

fn tell(standing: Standing, headers: &mut HeaderMap) {
    headers.insert(LIMIT, HeaderValue::from(standing.limit));
    headers.insert(REMAINING, HeaderValue::from(standing.remaining));
    headers.insert(RESET, HeaderValue::from(standing.reset_s));
}
