//! How far imports are, for who waits for them.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use tiffin_types::{id::AccountId, time::Timestamp};

/// What an import is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ImportStage {
    /// It waits for a place, finds out what the reference names, or waits for another import of the same.
    Resolving,
    /// It gets the layers.
    Receiving,
    /// It puts them together.
    Converting,
}

/// An import that is under way.
#[derive(Debug, Clone)]
pub(crate) struct ImportNow {
    /// The reference, as the client wrote it.
    pub(crate) image_uri: String,
    pub(crate) started_at: Timestamp,
    pub(crate) stage: ImportStage,
    /// Bytes of layers that are here.
    pub(crate) received_bytes: u64,
    /// Bytes of all layers, once known.
    pub(crate) expected_bytes: Option<u64>,
    /// Entries of layers that were unpacked.
    pub(crate) converted_entries: u64,
}

/// All imports that are under way, in the order in which they began.
#[derive(Default)]
pub(super) struct Ongoing {
    all: Arc<Mutex<BTreeMap<u64, (AccountId, ImportNow)>>>,
    next: AtomicU64,
}

impl Ongoing {
    /// Notes one until its last handle is dropped.
    pub(super) fn begin(&self, account: &AccountId, image_uri: &str) -> Progress {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let now = ImportNow {
            image_uri: image_uri.to_owned(),
            started_at: Timestamp::now(),
            stage: ImportStage::Resolving,
            received_bytes: 0,
            expected_bytes: None,
            converted_entries: 0,
        };
        hold(&self.all).insert(id, (account.clone(), now));
        Progress(Arc::new(Entry { id, all: Arc::clone(&self.all) }))
    }

    pub(super) fn list(&self, account: &AccountId) -> Vec<ImportNow> {
        hold(&self.all).values().filter(|(of, _)| of == account).map(|(_, now)| now.clone()).collect()
    }
}

/// One import's entry.
#[derive(Clone)]
pub(super) struct Progress(Arc<Entry>);

struct Entry {
    id: u64,
    all: Arc<Mutex<BTreeMap<u64, (AccountId, ImportNow)>>>,
}

impl Progress {
    pub(super) fn expect(&self, bytes: u64) {
        self.0.change(|now| (now.expected_bytes, now.stage) = (Some(bytes), ImportStage::Receiving));
    }

    pub(super) fn stage(&self, stage: ImportStage) {
        self.0.change(|now| now.stage = stage);
    }

    /// So many bytes more are here; what turned out to be wrong counts backwards.
    pub(super) fn received(&self, bytes: i64) {
        self.0.change(|now| now.received_bytes = now.received_bytes.saturating_add_signed(bytes));
    }

    pub(super) fn converted(&self, entries: u64) {
        self.0.change(|now| now.converted_entries = entries);
    }
}

impl Entry {
    fn change(&self, change: impl FnOnce(&mut ImportNow)) {
        if let Some((_, now)) = hold(&self.all).get_mut(&self.id) {
            change(now);
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        hold(&self.all).remove(&self.id);
    }
}

type All = BTreeMap<u64, (AccountId, ImportNow)>;

fn hold(all: &Mutex<All>) -> MutexGuard<'_, All> {
    all.lock().unwrap_or_else(PoisonError::into_inner)
}
