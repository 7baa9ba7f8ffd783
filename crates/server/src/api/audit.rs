//! What the audit trail notes of an operation that may change something.
//!
//! Invariant: one is noted when it succeeded, when it was refused for lack of rights, when it failed inside, and when its
//! client went away before the answer, as it may be done then. Nothing of a body is noted but the ids that the
//! answer to a create gives. Of somebody unknown only attempts to log in are noted, which the gate has counted: nobody
//! can fill the trail without a key or a session.

use std::sync::Arc;

use axum::{
    body::{Body, HttpBody, to_bytes},
    extract::{FromRequestParts, RawPathParams},
    http::{StatusCode, header, request::Parts},
    response::Response,
};
use serde_json::Value;

use super::{gate::Operation, layer::RequestId, request::Peer};
use crate::app::{
    App,
    auth::Caller,
    journal::{Entry, performer},
};

/// The status of what nobody waited for, as others write it.
const GONE: u16 = 499;
/// An answer to a create is no larger.
const ANSWER_BYTES: u64 = 256 << 10;
/// No target's text is longer.
const TARGET_BYTES: usize = 512;

/// Who has logged in, in the extensions of the answer.
#[derive(Clone)]
pub(super) struct LoggedInAs(pub(super) Caller);

/// That nothing was changed, in the extensions of an answer that is a success all the same.
#[derive(Clone)]
pub(super) struct NothingDone;

/// An operation that goes on.
pub(super) struct Audit {
    app: Arc<App>,
    is_administration: bool,
    /// Until the answer is there.
    entry: Option<Entry>,
}

impl Audit {
    /// Begins to watch an operation.
    pub(super) async fn begin(
        app: &Arc<App>,
        operation: &Operation,
        caller: Option<&Caller>,
        parts: &mut Parts,
    ) -> Self {
        let ids = RawPathParams::from_request_parts(parts, &()).await;
        let target: Vec<String> = ids.iter().flatten().map(|(_, value)| value.to_owned()).collect();
        let entry = Entry {
            event: operation.id.clone(),
            actor: performer(caller),
            account_id: caller.map(|caller| caller.account_id.clone()),
            target: shown(&target),
            status: Some(GONE),
            request_id: parts.extensions.get::<RequestId>().map(|id| id.0.clone()),
            peer: parts.extensions.get::<Peer>().map(|Peer(address)| address.to_string()),
            details: None,
            is_lasting: operation.is_administration && caller.is_some(),
        };
        Self { app: Arc::clone(app), is_administration: operation.is_administration, entry: Some(entry) }
    }

    /// Notes what the answer says.
    pub(super) async fn end(mut self, response: Response) -> Response {
        let Some(mut entry) = self.entry.take() else { return response };
        let status = response.status();
        let failed_login = status == StatusCode::UNAUTHORIZED;
        if status.is_client_error() && status != StatusCode::FORBIDDEN && !failed_login {
            return response;
        }
        let is_nothing = response.extensions().get::<NothingDone>().is_some();
        if is_nothing || (status == StatusCode::FORBIDDEN && entry.is_anonymous()) {
            return response;
        }
        entry.status = Some(status.as_u16());
        if let Some(LoggedInAs(caller)) = response.extensions().get() {
            entry.actor = performer(Some(caller));
            entry.account_id = Some(caller.account_id.clone());
            entry.is_lasting = true;
        }
        let (response, made) = made(response).await;
        if !made.is_empty() {
            // A snapshot is made of a VM: both are told.
            entry.target = shown(&entry.target.into_iter().chain(made).collect::<Vec<_>>());
        }
        if self.is_administration {
            self.app.journal.note_durably(entry).await;
        } else {
            self.app.journal.note(entry);
        }
        response
    }
}

impl Drop for Audit {
    fn drop(&mut self) {
        if let Some(entry) = self.entry.take().filter(|entry| !entry.is_anonymous()) {
            self.app.journal.note(entry);
        }
    }
}

/// Ids as one text; what can be no id, as it came from a client, is cut and made harmless.
fn shown(ids: &[String]) -> Option<String> {
    let text = ids.join(",");
    let text: String = text.chars().filter(|c| c.is_ascii_graphic()).take(TARGET_BYTES).collect();
    (!text.is_empty()).then_some(text)
}

/// The ids of what a create made, from its answer.
async fn made(response: Response) -> (Response, Vec<String>) {
    let is_json = response.headers().get(header::CONTENT_TYPE).is_some_and(|kind| kind == "application/json");
    let is_small = response.body().size_hint().exact().is_some_and(|bytes| bytes <= ANSWER_BYTES);
    if response.status() != StatusCode::CREATED || !is_json || !is_small {
        return (response, Vec::new());
    }
    let (parts, body) = response.into_parts();
    let bytes = to_bytes(body, usize::MAX).await.unwrap_or_default();
    let ids = match serde_json::from_slice(&bytes) {
        Ok(Value::Object(one)) => one.get("id").and_then(Value::as_str).map(str::to_owned).into_iter().collect(),
        Ok(Value::Array(several)) => {
            several.iter().filter_map(|one| one.get("id")?.as_str().map(str::to_owned)).collect()
        }
        Ok(_) | Err(_) => Vec::new(),
    };
    (Response::from_parts(parts, Body::from(bytes)), ids)
}
