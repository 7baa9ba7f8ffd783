//! What is written down without making anybody wait: the audit trail, changes of VMs, runs of commands.
//!
//! One bounded queue, and one writer that takes what has gathered into one transaction: a command costs no flush of
//! its own. Ids are given here, in the order of writing, and only what is written is shown to those who watch live, so
//! that whoever resumes from an id misses nothing.
//!
//! Invariants: entries hold no secrets, bodies or command lines (but see `exec.log_commands`); a full queue delays only who
//! asked to wait, and what is lost then is counted and logged. A server that is killed loses at most what was queued.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use tiffin_store::{Activity, ExecLog, Performer, PerformerKind, Store, Vm};
use tiffin_types::{id::AccountId, time::Timestamp};
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use ulid::Ulid;

use super::auth::{Actor, Caller};
use crate::error::chain;

/// Notes that wait to be written.
const QUEUED: usize = 8192;
/// Notes of one transaction.
const AT_ONCE: usize = 512;
/// Events that a watcher may be behind.
const BEHIND: usize = 1024;
/// How long who must know that it is written waits.
const WAIT: Duration = Duration::from_secs(5);
/// How often, and after which pauses, a failing database is tried.
const TRIES: [Duration; 4] =
    [Duration::ZERO, Duration::from_millis(100), Duration::from_millis(500), Duration::from_secs(2)];

/// An entry before it has an id.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) event: String,
    pub(crate) actor: Performer,
    pub(crate) account_id: Option<AccountId>,
    pub(crate) target: Option<String>,
    pub(crate) status: Option<u16>,
    pub(crate) request_id: Option<String>,
    pub(crate) peer: Option<String>,
    pub(crate) details: Option<serde_json::Value>,
    /// Whether it is forgotten by its age alone.
    pub(crate) is_lasting: bool,
}

enum Note {
    Entry(Timestamp, Box<Entry>, Option<oneshot::Sender<()>>),
    /// Its id is given at writing.
    Run(Box<ExecLog>),
}

/// The queue, and who watches.
pub(crate) struct Journal {
    queue: mpsc::Sender<Note>,
    waiting: Mutex<Option<mpsc::Receiver<Note>>>,
    live: broadcast::Sender<Arc<Activity>>,
}

impl Default for Journal {
    fn default() -> Self {
        let (queue, waiting) = mpsc::channel(QUEUED);
        Self { queue, waiting: Mutex::new(Some(waiting)), live: broadcast::Sender::new(BEHIND) }
    }
}

impl Journal {
    /// Notes an entry, without waiting.
    pub(crate) fn note(&self, entry: Entry) {
        self.put(Note::Entry(Timestamp::now(), Box::new(entry), None));
    }

    /// Notes an entry and waits until it is written. What can't be is logged: the change itself is done.
    pub(crate) async fn note_durably(&self, entry: Entry) {
        let (written, done) = oneshot::channel();
        let note = Note::Entry(Timestamp::now(), Box::new(entry), Some(written));
        let put = async { self.queue.send(note).await.is_ok() && done.await.is_ok() };
        if !matches!(tokio::time::timeout(WAIT, put).await, Ok(true)) {
            tracing::error!("an entry of the audit trail may not be written");
        }
    }

    /// Notes that something was run; without waiting.
    pub(super) fn note_run(&self, run: ExecLog) {
        self.put(Note::Run(Box::new(run)));
    }

    fn put(&self, note: Note) {
        if self.queue.try_send(note).is_err() {
            crate::metrics::journal_lost();
            tracing::error!("the queue of the journal is full: an entry is lost");
        }
    }

    /// What is written from now on.
    pub(crate) fn watch(&self) -> broadcast::Receiver<Arc<Activity>> {
        self.live.subscribe()
    }

    /// Writes what is queued until told to stop, and then what is left.
    pub(crate) async fn write(&self, store: &Store, runs_kept: u32, stop: CancellationToken) {
        let waiting = self.waiting.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
        let Some(mut waiting) = waiting else { return };
        let mut ids = Ids::after_newest(store).await;
        loop {
            let mut notes = Vec::new();
            let stopped = tokio::select! {
                _ = waiting.recv_many(&mut notes, AT_ONCE) => false,
                () = stop.cancelled() => true,
            };
            while notes.len() < AT_ONCE
                && let Ok(note) = waiting.try_recv()
            {
                notes.push(note);
            }
            if notes.is_empty() && stopped {
                return;
            }
            self.write_batch(store, runs_kept, notes, &mut ids).await;
        }
    }

    async fn write_batch(&self, store: &Store, runs_kept: u32, notes: Vec<Note>, ids: &mut Ids) {
        let (mut entries, mut runs, mut waiters) = (Vec::new(), Vec::new(), Vec::new());
        for note in notes {
            match note {
                Note::Entry(at, entry, waiter) => {
                    entries.push(entry.with_id(ids.next(), at));
                    waiters.extend(waiter);
                }
                Note::Run(run) => runs.push(ExecLog { id: ids.next(), ..*run }),
            }
        }
        for pause in TRIES {
            tokio::time::sleep(pause).await;
            match store.journal_write(&entries, &runs, runs_kept).await {
                Ok(()) => {
                    for entry in entries {
                        // Nobody may be watching.
                        let _ = self.live.send(Arc::new(entry));
                    }
                    for waiter in waiters {
                        let _ = waiter.send(());
                    }
                    return;
                }
                Err(error) => tracing::warn!(error = chain(&error), "the journal can't be written now"),
            }
        }
        crate::metrics::journal_lost();
        tracing::error!(entries = entries.len(), runs = runs.len(), "entries of the journal are lost");
    }
}

impl Entry {
    /// What became of a VM.
    pub(crate) fn of_vm(vm: &Vm) -> Self {
        let mut details = serde_json::json!({ "state": vm.state });
        if let Some(end) = &vm.end {
            details["reason"] = end.reason.as_str().into();
            details["message"] = end.message.clone().into();
        }
        Self {
            event: VM_STATE.into(),
            actor: Performer { kind: PerformerKind::System, id: None, name: None },
            account_id: Some(vm.account_id.clone()),
            target: Some(vm.id.to_string()),
            status: None,
            request_id: None,
            peer: None,
            details: Some(details),
            is_lasting: false,
        }
    }

    /// Whether nobody knows who did it.
    pub(crate) fn is_anonymous(&self) -> bool {
        self.actor.kind == PerformerKind::Anonymous
    }

    fn with_id(self, id: String, at: Timestamp) -> Activity {
        let Self { event, actor, account_id, target, status, request_id, peer, details, is_lasting } = self;
        Activity { id, at, event, actor, account_id, target, status, request_id, peer, details, is_lasting }
    }
}

/// The event of a VM that came into a state.
pub(crate) const VM_STATE: &str = "vm_state";

/// The caller, as the journal knows it.
pub(crate) fn performer(caller: Option<&Caller>) -> Performer {
    let (kind, id, name) = match caller.map(|caller| &caller.actor) {
        Some(Actor::Key { id, name }) => (PerformerKind::Key, Some(id.to_string()), Some(name.clone())),
        Some(Actor::User { id, email, .. }) => (PerformerKind::User, Some(id.to_string()), Some(email.clone())),
        None => (PerformerKind::Anonymous, None, None),
    };
    Performer { kind, id, name }
}

/// Gives ids, each greater than all before, also when the clock goes back.
struct Ids(Ulid);

impl Ids {
    async fn after_newest(store: &Store) -> Self {
        let newest = store.activity_list(1, None).await.unwrap_or_default();
        Self(newest.first().and_then(|entry| entry.id.parse().ok()).unwrap_or(Ulid(0)))
    }

    fn next(&mut self) -> String {
        self.0 = Ulid::generate().max(Ulid(self.0.0.saturating_add(1)));
        self.0.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_only_grow() {
        let ahead = Ulid::from_parts((1 << 47) - 1, 5);
        let mut ids = Ids(ahead);
        let given: Vec<String> = std::iter::once(ahead.to_string()).chain((0..100).map(|_| ids.next())).collect();
        assert!(given.is_sorted() && given.windows(2).all(|pair| pair[0] != pair[1]), "{given:?}");
    }
}
