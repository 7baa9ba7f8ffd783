//! `/v1/admin/events`: what is written down, as it is.
//!
//! Invariants: a stream tells every entry after the one that it resumes from, in order and once, or says that it has
//! missed some and ends; it ends soon after its key or session does. How far a reader may be behind is bounded by the
//! journal, how long it may stall by the socket.

use std::{collections::VecDeque, convert::Infallible, sync::Arc, time::Duration};

use axum::{
    extract::State,
    http::HeaderMap,
    response::{
        IntoResponse, Response, Sse,
        sse::{Event, KeepAlive},
    },
};
use futures_util::stream;
use serde_json::json;
use tiffin_store::Activity;
use tokio::{
    sync::{OwnedSemaphorePermit, broadcast},
    time::{Interval, MissedTickBehavior},
};

use super::activity::{ActivityBody, id};
use crate::{
    app::{
        App, activity,
        auth::{self, Caller},
    },
    error::AppError,
};

/// Between two heartbeats, which are comments.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// Entries that are read at once when a stream resumes.
const PAGE: u32 = 500;

/// Watch what is done and happens
///
/// Server-sent events: `vm_state` when a VM came into a state, `operation` when something was done, each with an entry of the
/// activity as data and its id. With `Last-Event-ID` the stream begins after that entry, as far back as entries are
/// kept; without it, with what comes. A reader that is too slow gets `missed` and the end: connect again with the last id.
/// Needs the scope `admin`.
#[utoipa::path(get, path = "/v1/admin/events", operation_id = "event_list", tag = "Administration",
    params(("Last-Event-ID" = Option<String>, Header, description = "The last event that was received")),
    responses((status = 200, description = "Events until one side ends it", body = String, content_type = "text/event-stream"),
        (status = 400), (status = 429)))]
pub(crate) async fn event_list(
    caller: Caller,
    State(app): State<Arc<App>>,
    headers: HeaderMap,
) -> Result<Response, AppError> {
    let after = match headers.get("last-event-id").map(|value| value.to_str().unwrap_or("")) {
        None | Some("") => None,
        Some(text) => Some(id(text).ok_or_else(|| {
            AppError::field("Last-Event-ID", "must be the id of an event, 26 letters and digits, or be left out")
        })?),
    };
    // Watched before it is read: what is written in between is seen twice, and told once.
    let (live, place) = activity::event_watch(&app, &caller)?;
    let mut check = tokio::time::interval(HEARTBEAT);
    check.set_missed_tick_behavior(MissedTickBehavior::Delay);
    check.reset();
    let (is_reading, told) = (after.is_some(), after.unwrap_or_default());
    let watch = Watch { app, caller, live, told, is_reading, read: VecDeque::new(), check, over: false, _place: place };
    let events = stream::unfold(watch, |mut watch| async {
        let event = watch.next().await?;
        Some((Ok::<Event, Infallible>(event), watch))
    });
    Ok(Sse::new(events).keep_alive(KeepAlive::new().interval(HEARTBEAT)).into_response())
}

/// A stream of events.
struct Watch {
    app: Arc<App>,
    caller: Caller,
    live: broadcast::Receiver<Arc<Activity>>,
    /// The last id that was told.
    told: String,
    /// Whether stored entries are read yet.
    is_reading: bool,
    read: VecDeque<Activity>,
    check: Interval,
    over: bool,
    _place: OwnedSemaphorePermit,
}

impl Watch {
    async fn next(&mut self) -> Option<Event> {
        if self.over {
            return None;
        }
        loop {
            if let Some(entry) = self.read.pop_front() {
                return Some(self.tell(entry));
            }
            if self.is_reading {
                match self.app.store.activity_after(&self.told, PAGE).await {
                    Ok(page) => {
                        self.is_reading = u32::try_from(page.len()) == Ok(PAGE);
                        self.read = page.into();
                    }
                    Err(_) => return Some(self.end("the events can't be read now: connect again")),
                }
                continue;
            }
            tokio::select! {
                entry = self.live.recv() => match entry {
                    Ok(entry) if entry.id <= self.told => {}
                    Ok(entry) => return Some(self.tell(Activity::clone(&entry))),
                    Err(broadcast::error::RecvError::Lagged(_)) => {
                        return Some(self.end("events were missed: connect again with Last-Event-ID"));
                    }
                    Err(broadcast::error::RecvError::Closed) => return None,
                },
                _ = self.check.tick() => {
                    // A database that doesn't answer is no reason to cut who was let in.
                    if matches!(auth::is_still_good(&self.app, &self.caller).await, Ok(false)) {
                        return None;
                    }
                }
                () = self.app.shutdown.cancelled() => return None,
            }
        }
    }

    fn tell(&mut self, entry: Activity) -> Event {
        self.told.clone_from(&entry.id);
        let name = if entry.event == crate::app::journal::VM_STATE { "vm_state" } else { "operation" };
        let body = ActivityBody::from(entry);
        let data = serde_json::to_string(&body).expect("plain structs with string keys always serialize");
        Event::default().id(body.id).event(name).data(data)
    }

    fn end(&mut self, message: &str) -> Event {
        self.over = true;
        Event::default().event("missed").data(json!({ "message": message }).to_string())
    }
}
