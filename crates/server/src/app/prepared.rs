//! Cached VMs that are down by their record and prepared on the host: booted, paused, with nothing of their program run. A
//! start lets one go on, instead of booting it.
//!
//! Invariants: what is prepared is what the engine sees as paused while its record says STOPPED, whichever server did it;
//! here is only remembered who they are, so that there are not too many and that they can make room. A VM that can't be
//! prepared boots when it is started: this changes how long a start takes and nothing else. Whoever changes one holds
//! its lock.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use tiffin_engine::{EngineError, Observed};
use tiffin_store::Vm;
use tiffin_types::{
    id::VmId,
    vm::{EndReason, EndReport, VmState},
};
use tokio::sync::Notify;

use super::App;
use crate::error::chain;

/// How often it is looked for VMs to prepare when nothing happens.
const IDLE_POLL: Duration = Duration::from_secs(10);
/// How often it is looked whether those who wait for VMs of their own have them.
const BUSY_POLL: Duration = Duration::from_millis(100);
/// For how long nothing is prepared after the host had no room, and a VM isn't after it failed.
const QUIET: Duration = Duration::from_secs(30);

/// Which VMs are prepared.
pub(crate) struct Prepared {
    most: usize,
    state: Mutex<State>,
    /// There may be one to prepare.
    changed: Notify,
}

#[derive(Default)]
struct State {
    ready: BTreeSet<VmId>,
    quiet_until: Option<Instant>,
    /// VMs that could not be prepared, and until when it isn't tried again.
    resting: HashMap<VmId, Instant>,
}

impl Prepared {
    pub(super) fn new(most: usize) -> Self {
        Self { most, state: Mutex::default(), changed: Notify::new() }
    }

    /// Nothing that holds this lock can leave the state half changed.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Boots a VM that is down and pauses it, if that is wanted now. On failure it is down. The caller holds its lock.
    pub(super) async fn prepare(&self, app: &App, id: &VmId) -> Result<(), EngineError> {
        if !self.has_room() || !app.engine.default_kind().capabilities.pause {
            return Ok(());
        }
        let boot = async {
            app.engine.start(id).await?;
            app.engine.pause(id).await
        };
        let prepared = match tokio::time::timeout(app.config.vm.start_timeout, boot).await {
            Ok(prepared) => prepared,
            Err(_) => Err(EngineError::Ended(too_slow())),
        };
        match prepared {
            Ok(()) => {
                self.lock().ready.insert(id.clone());
                tracing::debug!(vm_id = %id, "VM {id} is prepared");
            }
            Err(ref error) => {
                self.rest(id, error);
                put_down(app, id).await;
            }
        }
        prepared
    }

    fn has_room(&self) -> bool {
        let state = self.lock();
        state.ready.len() < self.most && state.quiet_until.is_none_or(|until| Instant::now() >= until)
    }

    fn rest(&self, id: &VmId, error: &EngineError) {
        tracing::warn!(vm_id = %id, error = chain(error), "VM {id} can't be prepared; it will boot when it is started");
        let (now, until) = (Instant::now(), Instant::now() + QUIET);
        let mut state = self.lock();
        if let EngineError::NoCapacity(_) = error {
            state.quiet_until = Some(until);
        }
        state.resting.retain(|_, until| now < *until);
        state.resting.insert(id.clone(), until);
    }

    /// The VM is being started, or is gone, or has ended.
    pub(crate) fn forget(&self, id: &VmId) -> bool {
        self.lock().ready.remove(id)
    }

    /// A VM came down, or one that was prepared is no more: there may be one to prepare.
    pub(crate) fn look(&self) {
        self.changed.notify_one();
    }

    /// Puts prepared VMs down, as somebody needs the room, and prepares none for a while; whether there was one.
    pub(super) async fn make_room(&self, app: &App, for_one: &VmId) -> bool {
        let ready: Vec<VmId> = {
            let mut state = self.lock();
            state.quiet_until = Some(Instant::now() + QUIET);
            state.ready.iter().filter(|id| *id != for_one).cloned().collect()
        };
        let mut made = false;
        for id in ready {
            // One whose lock is held is being started or removed. Waiting for it could be waiting for each other.
            if let Some(_lock) = app.locks.try_lock(&id)
                && self.forget(&id)
            {
                put_down(app, &id).await;
                made = true;
            }
        }
        made
    }
}

/// Prepares cached VMs that are down, for as long as the server runs.
pub(crate) async fn keep_prepared(app: Arc<App>) {
    if app.prepared.most == 0 || !app.engine.default_kind().capabilities.pause {
        return;
    }
    loop {
        let changed = app.prepared.changed.notified();
        let pause = if tend(&app).await { BUSY_POLL } else { IDLE_POLL };
        // Whichever comes first: the pause is over, or something changed.
        let _ = tokio::time::timeout(pause, changed).await;
    }
}

/// Prepares what is missing; whether something is still missing as others come first.
async fn tend(app: &Arc<App>) -> bool {
    let mut down = match app.store.vm_not_deleted().await {
        Ok(vms) => vms,
        Err(error) => {
            tracing::error!(error = chain(&error), "cached VMs can't be looked up now");
            return false;
        }
    };
    down.retain(|vm| vm.is_cached() && vm.state == VmState::Stopped);
    // What was used last is likely to be used next.
    down.sort_by_key(|vm| std::cmp::Reverse(vm.updated_at));
    for vm in &down {
        if app.prepared.lock().ready.contains(&vm.id) {
            continue;
        }
        if !app.places.are_all_free() {
            return true;
        }
        // In a task of its own, so that a shutdown doesn't cut it.
        let (work, vm) = (Arc::clone(app), vm.clone());
        // It panics only where the code is wrong, and then the next look tries again.
        let _ = app.tasks.spawn(async move { tend_one(&work, &vm).await }).await;
    }
    false
}

async fn tend_one(app: &App, vm: &Vm) {
    let Some(_lock) = app.locks.try_lock(&vm.id) else { return };
    match app.store.vm_get(&vm.account_id, &vm.id).await {
        Ok(Some(now)) if now.state == VmState::Stopped => {}
        Ok(_) | Err(_) => return,
    }
    let is_resting = app.prepared.lock().resting.get(&vm.id).is_some_and(|until| Instant::now() < *until);
    match app.engine.observe(&vm.id).await {
        // By an earlier server.
        Observed::Paused if app.prepared.has_room() => drop(app.prepared.lock().ready.insert(vm.id.clone())),
        Observed::Paused => put_down(app, &vm.id).await,
        // Logged where it fails.
        Observed::Stopped { .. } if !is_resting => drop(app.prepared.prepare(app, &vm.id).await),
        // The reconciler knows what to do.
        Observed::Stopped { .. } | Observed::Absent | Observed::Starting | Observed::Running | Observed::Unknown => {}
    }
}

async fn put_down(app: &App, id: &VmId) {
    match app.engine.stop(id, Duration::ZERO).await {
        Ok(_) | Err(EngineError::Absent) => {}
        Err(error) => {
            tracing::warn!(vm_id = %id, error = chain(&error), "VM {id}, prepared, can't be put down now");
        }
    }
}

fn too_slow() -> EndReport {
    EndReport { reason: EndReason::BootTimeout, message: "It was not up in time.".into(), exit_code: None }
}
