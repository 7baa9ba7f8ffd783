//! Sending a request to a program and waiting for the head of its answer.

use std::{pin::pin, sync::Arc, time::Duration};

use http::{Method, Request, Response};
use hyper::body::Incoming;
use tokio::time::{Instant, timeout_at};

use super::Kind;
use crate::{
    answer::{Refusal, chain},
    body::{Fate, RequestBody},
    upstream::{Backend, Lease},
};

/// Sends it on a kept connection or a new one. On a kept one that turns out to be closed it is sent once more, on a new
/// one, where nothing of it was sent or repeating it means nothing.
pub(super) async fn send(
    backend: &Arc<Backend>,
    mut request: Request<RequestBody>,
    kind: Kind,
    fate: &Fate,
    limit: Duration,
) -> Result<(Response<Incoming>, Lease), Refusal> {
    let mut fresh = false;
    loop {
        let mut lease = match kind {
            // What becomes a stream of its own takes no connection from others.
            Kind::WebSocket => backend.lease(true).await?,
            Kind::Plain => backend.lease(fresh).await?,
            Kind::Grpc => backend.lease_http2(fresh).await?,
        };
        let spare = if lease.is_reused { repeatable(&request) } else { None };
        let Some(sent) = in_time(lease.send(request), fate, limit).await else {
            return Err(Refusal::AnswerTimeout);
        };
        let mut failed = match sent {
            Ok(response) => return Ok((response, lease)),
            Err(failed) => failed,
        };
        let again = failed.take_message().or(spare).filter(|_| lease.is_reused && !failed.error().is_parse());
        match again {
            Some(again) => (request, fresh) = (again, true),
            None => return Err(reason(failed.error(), kind, fate)),
        }
    }
}

/// Waits for an answer. Its time begins anew with each piece of the body that is sent, and doesn't run while the client is
/// to send the next: that has a limit of its own.
async fn in_time<T>(answer: impl Future<Output = T>, fate: &Fate, limit: Duration) -> Option<T> {
    let (mut answer, mut since) = (pin!(answer), fate.moved());
    loop {
        match timeout_at(since + limit, &mut answer).await {
            Ok(answer) => return Some(answer),
            Err(_) if fate.is_waiting() => since = Instant::now(),
            Err(_) if since < fate.moved() => since = fate.moved(),
            Err(_) => return None,
        }
    }
}

/// A second copy of a request that may be sent twice.
fn repeatable(request: &Request<RequestBody>) -> Option<Request<RequestBody>> {
    let means_nothing =
        [Method::GET, Method::HEAD, Method::OPTIONS, Method::PUT, Method::DELETE].contains(request.method());
    let body = request.body().copy().filter(|_| means_nothing)?;
    let mut again = Request::new(body);
    *again.method_mut() = request.method().clone();
    *again.uri_mut() = request.uri().clone();
    *again.headers_mut() = request.headers().clone();
    Some(again)
}

fn reason(error: &hyper::Error, kind: Kind, fate: &Fate) -> Refusal {
    if fate.has_stalled() {
        return Refusal::BodyTimeout;
    }
    if fate.is_broken() {
        return Refusal::BadRequest("a body that breaks off");
    }
    tracing::debug!(error = chain(error), "a program gave no answer");
    match kind {
        Kind::Grpc => Refusal::NoHttp2,
        Kind::Plain | Kind::WebSocket if error.is_parse() => Refusal::BadAnswer,
        Kind::Plain | Kind::WebSocket => Refusal::Closed,
    }
}
