//! What stands before every operation of the API: from where, who calls, from which page, how often; and what is noted
//! of it.
//!
//! Invariant: it knows operations by the OpenAPI document alone, by route and method, so that none can be added without
//! passing here. Handlers take the [`Caller`] that it has found.

use std::{collections::HashMap, sync::Arc};

use axum::{
    extract::{FromRequestParts, MatchedPath, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, header, request::Parts},
    middleware::Next,
    response::{IntoResponse, Response},
};
use utoipa::openapi::OpenApi;

use super::{
    audit::Audit,
    cakework::unprefixed,
    layer::RequestId,
    request::{Peer, client_address},
    sessions::{Origin, origin, token},
};
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
pub(super) struct Operation {
    /// Its id in the document, by which the audit trail knows it.
    pub(super) id: String,
    /// Whether it needs a caller.
    guarded: bool,
    /// Whether it changes something.
    unsafe_: bool,
    limited: Option<Limited>,
    /// Whether its answer begins within the time that any operation may take; what runs in VMs or brings them up has
    /// limits of its own.
    is_quick: bool,
    /// Whether it is noted in the audit trail.
    is_noted: bool,
    /// Whether it is administration: its entry in the audit trail is written before the answer is given, and kept until
    /// it is old.
    pub(super) is_administration: bool,
    /// Which of the attempts to log in it may be.
    attempt: Option<Attempt>,
}

/// An operation that anybody may call who has no key or session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Attempt {
    /// It tries a password, whoever calls.
    Login,
    /// Whoever calls it without a session has nothing to do here.
    Other,
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
        for (route, method, id) in described(document) {
            let operation = Operation::new(id, &route, &method);
            operations.insert((route, method), operation);
        }
        Self { app, operations }
    }

    fn operation(&self, request: &Request) -> Option<&Operation> {
        let route = request.extensions().get::<MatchedPath>()?.as_str().to_owned();
        let method = if request.method() == Method::HEAD { Method::GET } else { request.method().clone() };
        self.operations.get(&(route, method))
    }
}

/// Every operation of a document that has an id: route, method, id.
fn described(document: &OpenApi) -> impl Iterator<Item = (String, Method, String)> {
    document.paths.paths.iter().flat_map(|(route, item)| {
        let methods = [
            (Method::GET, &item.get),
            (Method::POST, &item.post),
            (Method::PUT, &item.put),
            (Method::PATCH, &item.patch),
            (Method::DELETE, &item.delete),
        ];
        methods
            .into_iter()
            .filter_map(|(method, described)| Some((route.clone(), method, described.as_ref()?.operation_id.clone()?)))
    })
}

/// The ids of the operations that the audit trail notes.
pub(super) fn noted(document: &OpenApi) -> Vec<String> {
    let operations = described(document).map(|(route, method, id)| Operation::new(id, &route, &method));
    operations.filter(|operation| operation.is_noted).map(|operation| operation.id).collect()
}

impl Operation {
    fn new(id: String, route: &str, method: &Method) -> Self {
        let limited = limited(method, route);
        let is_administration = route.starts_with("/v1/admin/") || route.starts_with("/auth/");
        let unsafe_ = changes(method, unprefixed(route));
        let is_quick = is_administration || (!unsafe_ && route != "/v1/vms/{id}/files/download");
        let attempt = match route {
            "/auth/login" => Some(Attempt::Login),
            _ if unsafe_ && route.starts_with("/auth/") => Some(Attempt::Other),
            _ => None,
        };
        let is_noted = unsafe_ && !is_work(route);
        Self { id, guarded: is_guarded(route), unsafe_, limited, is_quick, is_noted, is_administration, attempt }
    }
}

/// Whether an operation changes something. The second dialect takes other methods for some.
fn changes(method: &Method, route: &str) -> bool {
    match (method.as_str(), route) {
        ("POST", "/v1/vm/{id}") => false,
        ("GET", "/v1/image/import") => true,
        (method, _) => method != "GET",
    }
}

/// Whether operations of that route need a caller.
pub(super) fn is_guarded(route: &str) -> bool {
    unprefixed(route).starts_with("/v1/") || unprefixed(route) == "/vms" || route == "/auth/me"
}

/// Whether a route is for what programs do in VMs all day: it would crowd out everything else that is noted, and the exec
/// logs have what was run.
fn is_work(route: &str) -> bool {
    let inside = route.strip_prefix("/v1/vms/{id}/").and_then(|rest| rest.split('/').next());
    matches!(inside, Some("exec" | "run-ts" | "run-js" | "files" | "terminal"))
}

/// The contract's limits, and under each what comes to the same.
fn limited(method: &Method, route: &str) -> Option<Limited> {
    match (method.as_str(), unprefixed(route)) {
        ("POST", "/v1/vm/start" | "/v1/vm/cache" | "/v1/vm/cached/{id}/start") => Some(Limited::VmCreate),
        // A fork makes VMs too, several at once; a snapshot costs as much.
        ("POST", "/v1/vms" | "/v1/vms/{id}/fork" | "/v1/vms/{id}/snapshots") => Some(Limited::VmCreate),
        ("POST", "/v1/vms/{id}/exec") | ("GET", "/v1/vms/{id}/terminal") => Some(Limited::Exec),
        ("POST", "/v1/vms/{id}/run-ts" | "/v1/vms/{id}/run-js") => Some(Limited::Run),
        ("POST", "/v1/vms/{id}/files/upload") | ("PUT", "/v1/vms/{id}/files/content") => Some(Limited::Upload),
        ("GET", "/v1/vms/{id}/files/download" | "/v1/vms/{id}/files/content" | "/v1/vms/{id}/files") => {
            Some(Limited::Download)
        }
        ("POST" | "GET", "/v1/image/import") => Some(Limited::Import),
        _ => None,
    }
}

/// Lets a request through, or not, and notes what it did.
pub(super) async fn pass(State(gate): State<Arc<Gate>>, request: Request, next: Next) -> Response {
    // Pages, unknown routes and methods are answered without knowing who asks.
    let Some(operation) = gate.operation(&request) else { return next.run(request).await };
    let (mut parts, body) = request.into_parts();
    // From here on a request comes from where the proxy says, if it is believed.
    let peer = client_address(&gate.app, &parts);
    if let Some(peer) = peer {
        parts.extensions.insert(Peer(peer));
    }
    let caller = match find_caller(&gate.app, operation, &mut parts).await {
        Ok(caller) => caller,
        Err(error) => return error.into_response(),
    };
    // Before anything is noted or compared: whoever has no session can make the server do only so much.
    if operation.attempt.is_some_and(|attempt| attempt == Attempt::Login || !is_user(caller.as_ref()))
        && let Err(error) = gate.app.rates.attempt(peer)
    {
        return error.into_response();
    }
    let audit = if operation.is_noted {
        Some(Audit::begin(&gate.app, operation, caller.as_ref(), &mut parts).await)
    } else {
        None
    };
    let mut response = match same_origin(operation, caller.as_ref(), &parts.headers) {
        Ok(()) => admitted(&gate.app, operation, caller, Request::from_parts(parts, body), next).await,
        Err(error) => error.into_response(),
    };
    if let Some(audit) = audit {
        response = audit.end(response).await;
    }
    response
}

/// Who calls. Where nobody needs to be known, a session is told if there is one.
async fn find_caller(app: &Arc<App>, operation: &Operation, parts: &mut Parts) -> Result<Option<Caller>, AppError> {
    if !operation.guarded && (!operation.unsafe_ || token(&parts.headers).is_none()) {
        return Ok(None);
    }
    let mut caller = match Caller::from_request_parts(parts, app).await {
        Ok(caller) => caller,
        Err(_) if !operation.guarded => return Ok(None),
        Err(error) => return Err(error),
    };
    caller.request_id = parts.extensions.get::<RequestId>().map(|id| id.0.as_str().into());
    Ok(Some(caller))
}

fn is_user(caller: Option<&Caller>) -> bool {
    caller.is_some_and(|caller| matches!(caller.actor, Actor::User { .. }))
}

/// Runs an operation for a caller, if not too often.
async fn admitted(
    app: &App,
    operation: &Operation,
    caller: Option<Caller>,
    mut request: Request,
    next: Next,
) -> Response {
    let Some(caller) = caller else { return run(app, operation, request, next).await };
    let standing = operation.limited.and_then(|what| Some((what, app.rates.take(what, caller.actor.id())?)));
    request.extensions_mut().insert(caller);
    let mut response = match standing {
        Some((what, standing)) if !standing.allowed => standing.refusal(what.name()).into_response(),
        Some(_) | None => run(app, operation, request, next).await,
    };
    if let Some((_, standing)) = standing {
        tell(standing, response.headers_mut());
    }
    response
}

/// A browser sends its cookie with whatever any page makes it send: what changes something, or opens a terminal, must say
/// that it comes from a page of this server. Keys are sent by nobody unknowingly. Nor must another site's page log
/// anybody in or out.
fn same_origin(operation: &Operation, caller: Option<&Caller>, headers: &HeaderMap) -> Result<(), AppError> {
    let origin = origin(headers);
    let changes = operation.unsafe_ || headers.contains_key(header::UPGRADE);
    let refused = match caller.map(|caller| &caller.actor) {
        Some(Actor::Key { .. }) => false,
        Some(Actor::User { .. }) if operation.guarded => changes && origin != Origin::Own,
        Some(Actor::User { .. }) | None => operation.unsafe_ && origin == Origin::Foreign,
    };
    if refused { Err(AppError::Csrf) } else { Ok(()) }
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
