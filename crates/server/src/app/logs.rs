//! What users' programs print: searched page by page, and followed. Written by monitors, kept beyond the VM.
//!
//! Disks are read on threads of their own, a few at once. A follower polls its log: looking costs some microseconds, and it
//! works the same whichever process writes.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use tiffin_logs::{Answer, Budget, Cursor, Line, Needle, Order, Query, Reader, Request};
use tiffin_types::{account::Scope, id::VmId, time::Timestamp, vm::VmState};
use tokio::{
    sync::OwnedSemaphorePermit,
    time::{Instant, Interval, MissedTickBehavior},
};

use super::{
    App,
    auth::{self, Caller},
    services::service_get,
};
use crate::error::{AppError, chain};

/// The folder below the data folder; each VM's is named after its id.
pub(crate) const FOLDER: &str = "logs";
/// Logs that are read at once.
pub(super) const READ_AT_ONCE: usize = 4;

/// Lines that a follower reads at once.
const AHEAD: usize = 256;
/// How soon a log is looked at again once its end was seen, at first and at most.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(500));
/// How often it is looked whether the VM is gone.
const LOOK: Duration = Duration::from_secs(2);
/// How often it is looked whether the caller may still see it.
const CHECK: Duration = Duration::from_secs(15);

/// A page of a VM's lines; also of one that is deleted.
pub(crate) async fn log_list(app: &Arc<App>, caller: &Caller, id: &VmId, request: Request) -> Result<Answer, AppError> {
    caller.require(Scope::Read)?;
    service_get(app, caller, id).await?;
    let reader = reader(app, id);
    read(app, id, move || request.answer(&reader, Timestamp::now(), Budget::default())).await
}

/// Where a follower begins.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Begin {
    /// After the line of that number.
    After(u64),
    /// So many lines before the end.
    Tail(u64),
    /// At the first line of that time or later.
    From(Timestamp),
}

/// Follows a VM's lines; of a VM that is deleted, to their end.
pub(crate) async fn log_follow(
    app: &Arc<App>,
    caller: &Caller,
    id: &VmId,
    begin: Begin,
    text: Option<Needle>,
) -> Result<Follower, AppError> {
    caller.require(Scope::Read)?;
    service_get(app, caller, id).await?;
    let place = Arc::clone(&app.followers).try_acquire_owned().map_err(|_| {
        AppError::TooMany(format!(
            "{} streams of logs are open, the most there may be: close one, or raise limits.log_streams",
            app.config.limits.log_streams
        ))
    })?;
    let reader = reader(app, id);
    let at = {
        let reader = reader.clone();
        read(app, id, move || begin.place(&reader)).await?
    };
    let mut check = tokio::time::interval(CHECK);
    check.set_missed_tick_behavior(MissedTickBehavior::Delay);
    check.reset();
    Ok(Follower {
        app: Arc::clone(app),
        caller: caller.clone(),
        id: id.clone(),
        reader,
        query: Query { text, after: Some(at), ..Query::new(Order::OldestFirst, AHEAD) },
        ready: VecDeque::new(),
        pause: PAUSE.0,
        looked_at: Instant::now(),
        gone_since: None,
        is_over: false,
        check,
        _place: place,
    })
}

impl Begin {
    fn place(self, reader: &Reader) -> std::io::Result<Cursor> {
        match self {
            Begin::After(number) => Ok(Cursor(number.saturating_add(1))),
            Begin::Tail(lines) => Ok(Cursor(reader.end()?.0.saturating_sub(lines))),
            Begin::From(from) => {
                let query = Query { from: Some(from), ..Query::new(Order::OldestFirst, 1) };
                let page = reader.page(&query)?;
                Ok(page.lines.first().map_or(page.position, |line| Cursor(line.number)))
            }
        }
    }
}

/// What a follower sees next.
#[derive(Debug)]
pub(crate) enum Followed {
    /// A line.
    Line(Line),
    /// So many lines were forgotten before they were told.
    Missed(u64),
    /// The VM is gone, and that was all.
    End,
}

/// Follows a VM's lines. Invariant: each is told once and in order, or `Missed` tells that it isn't.
pub(crate) struct Follower {
    app: Arc<App>,
    caller: Caller,
    id: VmId,
    reader: Reader,
    query: Query,
    ready: VecDeque<Followed>,
    pause: Duration,
    looked_at: Instant,
    gone_since: Option<Instant>,
    is_over: bool,
    check: Interval,
    _place: OwnedSemaphorePermit,
}

impl Follower {
    /// What comes next; `None` when the stream is to end, and may be taken up again.
    pub(crate) async fn next(&mut self) -> Option<Followed> {
        loop {
            if let Some(followed) = self.ready.pop_front() {
                return Some(followed);
            }
            if self.is_over {
                return None;
            }
            // Before the log is read: what a VM that is gone had printed is there.
            let was_gone = self.gone_since.is_some_and(|since| since.elapsed() >= LOOK);
            let is_end = self.read_on().await?;
            if !self.ready.is_empty() {
                self.pause = PAUSE.0;
            } else if is_end && was_gone {
                self.is_over = true;
                self.ready.push_back(Followed::End);
            } else if is_end {
                self.wait().await?;
            }
        }
    }

    async fn read_on(&mut self) -> Option<bool> {
        let (reader, query) = (self.reader.clone(), self.query.clone());
        let page = read(&self.app, &self.id, move || reader.page(&query)).await;
        let page = page.map_err(|error| tracing::error!(error = error.inside(), "a log can't be followed")).ok()?;
        let expected = self.query.after.map_or(0, |place| place.0);
        // With a text, lines are left out on purpose.
        if let (None, Some(first)) = (&self.query.text, page.lines.first())
            && first.number > expected
        {
            self.ready.push_back(Followed::Missed(first.number - expected));
        }
        self.ready.extend(page.lines.into_iter().map(Followed::Line));
        self.query.after = Some(page.position);
        Some(page.is_end)
    }

    /// Waits until it is worth to look again; `None` when the stream is to end.
    async fn wait(&mut self) -> Option<()> {
        tokio::select! {
            () = tokio::time::sleep(self.pause) => {}
            _ = self.check.tick() => {
                // A database that doesn't answer is no reason to cut who was let in.
                if matches!(auth::is_still_good(&self.app, &self.caller).await, Ok(false)) {
                    return None;
                }
            }
            () = self.app.shutdown.cancelled() => return None,
        }
        self.pause = (self.pause * 2).min(PAUSE.1);
        if self.gone_since.is_none() && self.looked_at.elapsed() >= LOOK {
            self.looked_at = Instant::now();
            if self.is_gone().await {
                self.gone_since = Some(self.looked_at);
            }
        }
        Some(())
    }

    /// Whether the VM is deleted. Its record is before its program is: lines may still come for a moment.
    async fn is_gone(&self) -> bool {
        match self.app.store.vm_get(&self.caller.account_id, &self.id).await {
            Ok(vm) => vm.is_none_or(|vm| vm.state == VmState::Deleted),
            Err(error) => {
                tracing::warn!(error = chain(&error), "whether a VM is gone can't be told now");
                false
            }
        }
    }
}

fn reader(app: &App, id: &VmId) -> Reader {
    Reader::open(app.config.data_dir.join(FOLDER).join(id.as_str()))
}

/// Reads on a thread of its own, when there is a place.
async fn read<T: Send + 'static>(
    app: &App,
    id: &VmId,
    what: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T, AppError> {
    let failed = |error| AppError::internal(format!("reading the lines of VM {id}"), error);
    let place =
        Arc::clone(&app.log_readers).acquire_owned().await.map_err(|closed| failed(std::io::Error::other(closed)))?;
    let work = move || {
        let outcome = what();
        // Held as long as the thread is used, also when nobody waits any more.
        drop(place);
        outcome
    };
    tokio::task::spawn_blocking(work).await.map_err(|panicked| failed(std::io::Error::other(panicked)))?.map_err(failed)
}
