//! VMs that are up before anybody asks for them.
//!
//! A create that boots takes one of the right image and size, if there is one, instead of waiting for a boot: it gives it
//! the request's network policy, sees that it runs, and makes its record, which begins as RUNNING. A pooled VM has
//! booted under its own id and reaches nothing outside, so there is nothing of anybody in it.
//!
//! Invariants: the pool changes how long a create takes and nothing else: whatever is wrong with a pooled VM, the request
//! boots one. Pooled VMs are in memory and on the engine, in no record: those that a killed server leaves are
//! destroyed by the next one as VMs that nobody knows. They make room for whoever finds the host full.

mod demand;
mod refill;

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use tiffin_engine::Observed;
use tiffin_store::NewVm;
use tiffin_types::{
    id::{Digest, VmId},
    network::EgressPolicy,
    vm::{EngineName, VmSize},
};
use tokio::sync::{Notify, OwnedRwLockWriteGuard};

use super::{App, vms::destroy};
use crate::{config::PoolConfig, error::chain, metrics};
use demand::Demand;
pub(crate) use refill::keep_filled;

/// How long giving a pooled VM its policy and looking at it may take.
const CLAIM: Duration = Duration::from_secs(5);
/// For how long nothing is booted ahead after the host had no room, and none of a kind after one failed.
const QUIET: Duration = Duration::from_secs(30);

/// What VMs of a pool are alike in.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Kind {
    pub(crate) image: Digest,
    pub(crate) kernel: Option<Digest>,
    pub(crate) size: VmSize,
    pub(crate) engine: EngineName,
}

impl Kind {
    fn of(new: &NewVm) -> Self {
        let (image, kernel) = (new.image_digest.clone(), new.kernel_digest.clone());
        Self { image, kernel, size: new.size, engine: new.engine }
    }

    /// Whether its VMs need that blob.
    fn is_of(&self, blob: &Digest) -> bool {
        self.image == *blob || self.kernel.as_ref() == Some(blob)
    }
}

/// The pool.
pub(crate) struct Pool {
    config: PoolConfig,
    state: Mutex<State>,
    /// Something was taken or asked for.
    changed: Notify,
    /// Held while a VM is booted ahead.
    booting: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    demand: Demand,
    ready: HashMap<Kind, VecDeque<VmId>>,
    quiet_until: Option<Instant>,
    /// Kinds of which none came up, and until when none is tried.
    resting: HashMap<Kind, Instant>,
    /// What is on its way up, unless it isn't wanted any more.
    coming: Option<(Kind, VmId)>,
    closed: bool,
}

impl State {
    fn ready_count(&self) -> usize {
        self.ready.values().map(VecDeque::len).sum()
    }

    fn is_quiet(&self) -> bool {
        self.closed || self.quiet_until.is_some_and(|until| Instant::now() < until)
    }

    fn is_resting(&self, kind: &Kind) -> bool {
        self.resting.get(kind).is_some_and(|until| Instant::now() < *until)
    }

    fn tell(&self) {
        metrics::pool_ready(self.ready_count());
    }
}

/// A VM that was taken from the pool, and its lock.
pub(super) struct Claimed {
    pub(super) id: VmId,
    kind: Kind,
    /// Whether it has been given a policy.
    opened: bool,
    _lock: OwnedRwLockWriteGuard<()>,
}

impl Pool {
    pub(super) fn new(config: PoolConfig) -> Self {
        Self { config, state: Mutex::default(), changed: Notify::new(), booting: tokio::sync::Mutex::default() }
    }

    /// Nothing that holds this lock can leave the state half changed.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn is_off(&self) -> bool {
        self.config.max_vms == 0
    }

    /// A VM that runs, of the image, size and network policy of `new`; `None` where one has to boot.
    pub(super) async fn claim(&self, app: &Arc<App>, new: &NewVm) -> Option<Claimed> {
        if self.is_off() || !may_be_pooled(new) {
            return None;
        }
        let kind = Kind::of(new);
        let mut outcome = "miss";
        let claimed = loop {
            let Some(id) = self.take(&kind) else { break None };
            // Until its record is made: its end, should it come now, waits for that.
            let lock = app.locks.lock(&id).await;
            let claimed =
                Claimed { id, kind: kind.clone(), opened: new.egress != EgressPolicy::default(), _lock: lock };
            if is_fit(app, &claimed, &new.egress).await {
                outcome = "hit";
                break Some(claimed);
            }
            outcome = "unfit";
            discard(app, claimed.id);
        };
        metrics::pool_claim(outcome);
        claimed
    }

    /// Such a VM was made, and runs: more of its kind may be asked for.
    pub(super) fn note(&self, new: &NewVm) {
        if !self.is_off() && may_be_pooled(new) {
            self.lock().demand.note(&Kind::of(new), self.config.max_vms);
            self.changed.notify_one();
        }
    }

    fn take(&self, kind: &Kind) -> Option<VmId> {
        let mut state = self.lock();
        let id = state.ready.get_mut(kind).and_then(VecDeque::pop_front);
        state.tell();
        id
    }

    /// Takes back a VM that no record was made for. One that has been given a policy is not for anybody else.
    pub(super) fn give_back(&self, app: &Arc<App>, claimed: Claimed) {
        {
            let mut state = self.lock();
            if !claimed.opened && !state.closed {
                state.ready.entry(claimed.kind).or_default().push_front(claimed.id);
                state.tell();
                return;
            }
        }
        discard(app, claimed.id);
    }

    /// Destroys a VM that may have a record or not: whether it was made can't be told now.
    pub(super) fn give_up(&self, app: &Arc<App>, claimed: Claimed) {
        discard(app, claimed.id);
    }

    /// Drops a VM whose run has ended, if it is a pooled one.
    pub(crate) fn ended(&self, app: &Arc<App>, id: &VmId) {
        if self.remove(id) {
            tracing::info!(vm_id = %id, "VM {id} ended while it was booted ahead");
            discard(app, id.clone());
            self.changed.notify_one();
        }
    }

    fn remove(&self, id: &VmId) -> bool {
        let mut state = self.lock();
        let before = state.ready_count();
        state.ready.values_mut().for_each(|ids| ids.retain(|ready| ready != id));
        state.tell();
        state.ready_count() < before
    }

    /// Destroys the VMs of a blob, an image's files or its kernel, that nobody can ask for any more, one that is on its way
    /// up too.
    pub(crate) async fn forget_blob(&self, app: &App, blob: &Digest) {
        let gone: Vec<VmId> = {
            let mut state = self.lock();
            state.demand.forget_blob(blob);
            let (of_it, others) = std::mem::take(&mut state.ready).into_iter().partition(|(kind, _)| kind.is_of(blob));
            state.ready = others;
            state.tell();
            let of_it: HashMap<Kind, VecDeque<VmId>> = of_it;
            let coming = state.coming.take_if(|(kind, _)| kind.is_of(blob)).map(|(_, id)| id);
            of_it.into_values().flatten().chain(coming).collect()
        };
        destroy_all(app, &gone).await;
    }

    /// Drops the pooled VMs that don't run, which the engine didn't tell of.
    pub(crate) async fn check(&self, app: &Arc<App>) {
        let ready: Vec<VmId> = self.lock().ready.values().flatten().cloned().collect();
        for id in ready {
            match app.engine.observe(&id).await {
                Observed::Running | Observed::Unknown => {}
                Observed::Absent | Observed::Stopped { .. } | Observed::Starting | Observed::Paused => {
                    self.ended(app, &id);
                }
            }
        }
    }

    /// Destroys every pooled VM, as somebody needs the room, and boots none for a while; whether there was one.
    pub(super) async fn make_room(&self, app: &App) -> bool {
        if self.is_off() {
            return false;
        }
        self.lock().quiet_until = Some(Instant::now() + QUIET);
        // One that is on its way up goes too, as it finds that it is quiet.
        let was_booting = self.booting.try_lock().is_err();
        let _booted = self.booting.lock().await;
        let ready = self.drain();
        destroy_all(app, &ready).await;
        was_booting || !ready.is_empty()
    }

    /// Destroys every pooled VM; from now on each create boots.
    pub(crate) async fn close(&self, app: &App) {
        self.lock().closed = true;
        let _booted = self.booting.lock().await;
        let ready = self.drain();
        destroy_all(app, &ready).await;
    }

    fn drain(&self) -> Vec<VmId> {
        let mut state = self.lock();
        let ready = state.ready.drain().flat_map(|(_, ids)| ids).collect();
        state.tell();
        ready
    }
}

/// A VM of a snapshot has its own memory, and one that runs a program is its image's, which may be of any kind.
fn may_be_pooled(new: &NewVm) -> bool {
    new.snapshot_id.is_none() && new.service.is_none()
}

/// Gives the VM its policy, and looks whether it runs.
async fn is_fit(app: &App, claimed: &Claimed, egress: &EgressPolicy) -> bool {
    let id = &claimed.id;
    let look = async {
        if claimed.opened
            && let Err(error) = app.engine.set_egress(id, egress).await
        {
            tracing::warn!(vm_id = %id, error = chain(&error), "VM {id}, booted ahead, can't be given a policy");
            return false;
        }
        app.engine.observe(id).await == Observed::Running
    };
    tokio::time::timeout(CLAIM, look).await.unwrap_or(false)
}

async fn destroy_all(app: &App, ids: &[VmId]) {
    futures_util::future::join_all(ids.iter().map(|id| async {
        // Logged where it fails, and tried again by the reconciler.
        let _ = destroy(app, id).await;
    }))
    .await;
}

/// Destroys a VM of the pool in the background.
fn discard(app: &Arc<App>, id: VmId) {
    let work = Arc::clone(app);
    app.tasks.spawn(async move { destroy_all(&work, &[id]).await });
}
