//! A connection to a program, held for one request.

use std::sync::{Arc, Weak};

use http::{Request, Response};
use hyper::{
    body::Incoming,
    client::conn::{TrySendError, http1, http2},
};
use tokio::sync::OwnedSemaphorePermit;

use super::Backend;
use crate::body::RequestBody;

/// How requests are sent on it.
pub(crate) enum Sender {
    Http1(http1::SendRequest<RequestBody>),
    Http2(http2::SendRequest<RequestBody>),
}

/// Its place among the backend's connections.
enum Place {
    Own(OwnedSemaphorePermit),
    Shared(#[allow(dead_code, reason = "held")] Arc<OwnedSemaphorePermit>),
}

/// The connection. Dropped, it is closed; given back, it is kept for the next request.
pub(crate) struct Lease {
    sender: Sender,
    place: Place,
    backend: Weak<Backend>,
    /// It was used before, so the program may just be closing it.
    pub(crate) is_reused: bool,
}

impl Lease {
    pub(super) fn new(backend: Weak<Backend>, sender: Sender, place: OwnedSemaphorePermit) -> Self {
        Self { sender, place: Place::Own(place), backend, is_reused: false }
    }

    pub(super) fn kept(
        backend: Weak<Backend>,
        sender: http1::SendRequest<RequestBody>,
        place: OwnedSemaphorePermit,
    ) -> Self {
        Self { is_reused: true, ..Self::new(backend, Sender::Http1(sender), place) }
    }

    pub(super) fn shared(sender: http2::SendRequest<RequestBody>, place: Arc<OwnedSemaphorePermit>) -> Self {
        Self { sender: Sender::Http2(sender), place: Place::Shared(place), backend: Weak::new(), is_reused: true }
    }

    pub(super) fn unused(self) -> Self {
        Self { is_reused: false, ..self }
    }

    /// Sends a request. It comes back if nothing of it was sent.
    pub(crate) async fn send(
        &mut self,
        request: Request<RequestBody>,
    ) -> Result<Response<Incoming>, TrySendError<Request<RequestBody>>> {
        match &mut self.sender {
            Sender::Http1(sender) => sender.try_send_request(request).await,
            Sender::Http2(sender) => sender.try_send_request(request).await,
        }
    }

    /// Request and answer are over.
    pub(crate) fn give_back(self) {
        if let (Sender::Http1(sender), Place::Own(place), Some(backend)) =
            (self.sender, self.place, self.backend.upgrade())
        {
            backend.keep(sender, place);
        }
    }

    /// Its place, for what goes on after the answer.
    pub(crate) fn into_place(self) -> Box<dyn Send> {
        match self.place {
            Place::Own(place) => Box::new(place),
            Place::Shared(place) => Box::new(place),
        }
    }
}
