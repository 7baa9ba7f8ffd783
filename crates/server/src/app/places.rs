//! Bounds: one change at a time for each VM and snapshot, so many VMs coming up at once, so many commands in each VM, and of
//! what all accounts have together, so many places for one of them.
//!
//! Invariant: a place is taken when the locks are held, never the other way round. Otherwise whoever asks often for one
//! VM would fill the places with requests that wait for its lock; and nobody who holds a place waits for a lock, so they
//! can't wait for each other.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard, Weak},
    time::Duration,
};

use tiffin_types::id::{AccountId, VmId};
use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, OwnedSemaphorePermit, RwLock, Semaphore};

use crate::error::AppError;

/// A lock for each VM or snapshot. Entries go when nobody holds or waits for them.
pub(crate) struct Locks<K>(Mutex<HashMap<K, Weak<RwLock<()>>>>);

impl<K> Default for Locks<K> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Clone + Eq + std::hash::Hash> Locks<K> {
    /// Waits for, and holds, the lock: nobody else changes the thing.
    pub(crate) async fn lock(&self, id: &K) -> OwnedRwLockWriteGuard<()> {
        self.entry(id).write_owned().await
    }

    /// The lock, if nobody holds it now.
    pub(crate) fn try_lock(&self, id: &K) -> Option<OwnedRwLockWriteGuard<()>> {
        self.entry(id).try_write_owned().ok()
    }

    /// Waits for, and holds, a share of the lock: nobody changes the thing while others may use it too.
    pub(crate) async fn share(&self, id: &K) -> OwnedRwLockReadGuard<()> {
        self.entry(id).read_owned().await
    }

    /// Whether nobody holds the lock now.
    pub(crate) fn is_free(&self, id: &K) -> bool {
        hold(&self.0).get(id).is_none_or(|lock| lock.strong_count() == 0)
    }

    fn entry(&self, id: &K) -> Arc<RwLock<()>> {
        let mut locks = hold(&self.0);
        if let Some(lock) = locks.get(id).and_then(Weak::upgrade) {
            return lock;
        }
        locks.retain(|_, lock| lock.strong_count() > 0);
        let lock = Arc::default();
        locks.insert(id.clone(), Arc::downgrade(&lock));
        lock
    }
}

/// Places for work of one kind, such as VMs that come up or are saved, and a bounded queue before them.
pub(super) struct Places {
    running: Arc<Semaphore>,
    queue: Arc<Semaphore>,
    most: usize,
    wait: Duration,
    busy: &'static str,
}

impl Places {
    /// So many at once, and so many more that wait no longer than that; `busy` tells whoever finds none.
    pub(super) fn new(most: usize, queued: usize, wait: Duration, busy: &'static str) -> Self {
        let bounded = |count: usize| Arc::new(Semaphore::new(count.min(Semaphore::MAX_PERMITS)));
        Self {
            most: most.min(Semaphore::MAX_PERMITS),
            running: bounded(most),
            queue: bounded(most.saturating_add(queued)),
            wait,
            busy,
        }
    }

    /// Whether nobody has a place, or waits for one.
    pub(super) fn are_all_free(&self) -> bool {
        self.running.available_permits() == self.most
    }

    /// A place, or a refusal when the queue is full or too slow. Dropping the place frees it.
    pub(super) async fn take(&self) -> Result<Place, AppError> {
        let busy = || AppError::Unavailable { code: "busy", message: self.busy.into() };
        let queued = Arc::clone(&self.queue).try_acquire_owned().map_err(|_| busy())?;
        let running = tokio::time::timeout(self.wait, Arc::clone(&self.running).acquire_owned()).await;
        match running {
            Ok(Ok(running)) => Ok(Place { _running: running, _queued: queued }),
            Ok(Err(_)) | Err(_) => Err(busy()),
        }
    }
}

/// The right to bring one VM up, to save one, or to whatever else the places are for.
pub(super) struct Place {
    _running: OwnedSemaphorePermit,
    _queued: OwnedSemaphorePermit,
}

/// How many of something each has, such as commands a VM.
struct Counts<K>(Arc<Mutex<HashMap<K, usize>>>);

impl<K: Clone + Eq + Hash> Counts<K> {
    fn new() -> Self {
        Self(Arc::default())
    }

    /// One more of that one's, unless it has `most`.
    fn take(&self, of: &K, most: usize) -> Option<Counted<K>> {
        let mut counts = hold(&self.0);
        let count = counts.entry(of.clone()).or_default();
        if *count >= most {
            return None;
        }
        *count += 1;
        Some(Counted { of: of.clone(), counts: Arc::clone(&self.0) })
    }
}

/// One that is counted, until it is dropped.
pub(super) struct Counted<K: Eq + Hash> {
    of: K,
    counts: Arc<Mutex<HashMap<K, usize>>>,
}

impl<K: Eq + Hash> Drop for Counted<K> {
    fn drop(&mut self) {
        let mut counts = hold(&self.counts);
        if let Some(count) = counts.get_mut(&self.of) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.of);
            }
        }
    }
}

/// How many commands run in each VM.
pub(super) struct Commands {
    most: usize,
    counts: Counts<VmId>,
}

/// The right to run one command in a VM.
pub(super) type CommandPlace = Counted<VmId>;

impl Commands {
    pub(super) fn new(most: usize) -> Self {
        Self { most, counts: Counts::new() }
    }

    /// The right to run one more command in the VM, until it is dropped.
    pub(super) fn take(&self, id: &VmId) -> Result<CommandPlace, AppError> {
        let most = self.most;
        self.counts
            .take(id, most)
            .ok_or_else(|| AppError::TooMany(format!("{most} commands run in this VM, the most at once; try again")))
    }
}

/// What one account may have of places that all share: it leaves others one, where there is more than one.
pub(super) struct Shares {
    of_one: usize,
    /// What is counted, for who has too many.
    what: &'static str,
    counts: Counts<AccountId>,
}

/// One of an account's places.
pub(super) type Share = Counted<AccountId>;

impl Shares {
    /// Of so many places.
    pub(super) fn new(places: usize, what: &'static str) -> Self {
        Self { of_one: places.saturating_sub(1).max(1), what, counts: Counts::new() }
    }

    /// One more of the account's, until it is dropped.
    pub(super) fn take(&self, account: &AccountId) -> Result<Share, AppError> {
        let (of_one, what) = (self.of_one, self.what);
        self.counts.take(account, of_one).ok_or_else(|| {
            AppError::TooMany(format!(
                "{of_one} {what} of this account are under way, the most at once: try again when one of them is done"
            ))
        })
    }
}

/// Nothing that holds these locks can leave them half changed.
fn hold<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
