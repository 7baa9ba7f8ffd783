//! Saving a VM: for a snapshot, and for a fork.
//!
//! The VM's lock is held, so it isn't stopped or started meanwhile. Its deletion takes no lock and wins: then the save
//! fails, and nothing is left of the snapshot.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::json;
use tiffin_engine::{EngineError, Observed};
use tiffin_store::{NewSnapshot, Snapshot, SnapshotInserted, Vm};
use tiffin_types::{
    account::Scope,
    id::{SnapshotId, VmId},
    snapshot::{SnapshotEvent, SnapshotState},
    vm::VmState,
};
use tokio::sync::OwnedRwLockWriteGuard;

use super::{App, Caller, can_snapshot, remove};
use crate::{
    app::vms::{vm_get, wrong_state},
    error::{AppError, chain},
    fault, metrics,
};

/// A snapshot that was just taken.
pub(crate) struct Taken {
    pub(crate) snapshot: Snapshot,
    /// For how long the VM stood still.
    pub(crate) paused: Duration,
}

/// Saves a running VM, which runs on.
pub(crate) async fn snapshot_create(
    app: &Arc<App>,
    caller: &Caller,
    id: &VmId,
    name: Option<String>,
) -> Result<Taken, AppError> {
    caller.require(Scope::Write)?;
    let (work, caller, id) = (Arc::clone(app), caller.clone(), id.clone());
    app.run(async move {
        running(&work, &caller, &id).await?;
        let (vm_lock, vm) = hold_running(&work, &caller, &id).await?;
        can_snapshot(&work, vm.engine)?;
        let account = work.store.account_get(&caller.account_id).await?.ok_or(AppError::NotFound("account"))?;
        let new = new_snapshot(&vm, name);
        let _lock = work.snapshot_locks.lock(&new.id).await;
        let _place = work.places.take().await?;
        let most = work.config.limits.snapshots_per_account;
        match work.store.snapshot_insert(&new, &account.quota, most).await? {
            SnapshotInserted::New(_) => {}
            SnapshotInserted::OverQuota(over) => return Err(AppError::OverQuota(over)),
        }
        let saved = save(&work, &vm, &new.id).await;
        drop(vm_lock);
        if saved.is_err() {
            discard(&work, &new.id).await;
        }
        saved
    })
    .await
}

/// A snapshot of that VM, to be.
pub(crate) fn new_snapshot(vm: &Vm, name: Option<String>) -> NewSnapshot {
    NewSnapshot {
        id: SnapshotId::random(),
        account_id: vm.account_id.clone(),
        vm_id: vm.id.clone(),
        name,
        image_id: vm.image_id.clone(),
        image_digest: vm.image_digest.clone(),
        kernel_digest: vm.kernel_digest.clone(),
        engine: vm.engine,
        size: vm.size,
    }
}

/// The caller's VM and its lock, when it is RUNNING.
pub(crate) async fn hold_running(
    app: &App,
    caller: &Caller,
    id: &VmId,
) -> Result<(OwnedRwLockWriteGuard<()>, Vm), AppError> {
    let lock = app.locks.lock(id).await;
    Ok((lock, running(app, caller, id).await?))
}

/// The caller's VM, when it is RUNNING.
pub(crate) async fn running(app: &App, caller: &Caller, id: &VmId) -> Result<Vm, AppError> {
    let vm = vm_get(app, caller, id).await?;
    if vm.state == VmState::Running { Ok(vm) } else { Err(wrong_state(&vm, "RUNNING")) }
}

/// Has the engine save a VM whose lock is held into a snapshot that is SAVING, and takes that to READY. On failure the
/// record is the caller's to settle.
pub(crate) async fn save(app: &App, vm: &Vm, into: &SnapshotId) -> Result<Taken, AppError> {
    let began = Instant::now();
    let outcome = save_in_time(app, vm, into).await;
    metrics::snapshot_save(outcome.is_ok(), began.elapsed());
    if let Ok(Taken { snapshot, .. }) = &outcome {
        let (size_bytes, took_ms) = (snapshot.size_bytes, began.elapsed().as_millis());
        tracing::info!(snapshot_id = %into, vm_id = %vm.id, size_bytes, took_ms, "VM {} saved as {into}", vm.id);
    }
    outcome
}

async fn save_in_time(app: &App, vm: &Vm, into: &SnapshotId) -> Result<Taken, AppError> {
    fault::point("after_snapshot_intent");
    // Nobody waits on them, and a VM with an open connection can't be saved.
    app.routes.close_idle(&vm.id);
    let limit = app.config.vm.snapshot_timeout;
    let saved = match tokio::time::timeout(limit, app.engine.snapshot_save(&vm.id, into)).await {
        Ok(Ok(saved)) => saved,
        Ok(Err(error)) => return Err(why(app, vm, error).await),
        Err(_) => {
            let limit_ms = limit.as_millis();
            return Err(AppError::Unavailable {
                code: "snapshot_timeout",
                message: format!("the VM was not saved within {limit_ms} ms, and nothing is left of the snapshot"),
            });
        }
    };
    fault::point("after_engine_save");
    fault::point("before_snapshot_commit");
    let ready = app.store.snapshot_saved(into, saved.size_bytes).await?;
    fault::point("after_snapshot_commit");
    let snapshot = ready.ok_or(AppError::NotFound("snapshot"))?;
    Ok(Taken { snapshot, paused: saved.paused })
}

/// Why a VM could not be saved: often as it ended or was deleted meanwhile.
async fn why(app: &App, vm: &Vm, error: EngineError) -> AppError {
    let now = app.store.vm_get(&vm.account_id, &vm.id).await.ok().flatten();
    if now.is_some_and(|now| now.state == VmState::Deleted) {
        return AppError::NotFound("VM");
    }
    match app.engine.observe(&vm.id).await {
        Observed::Stopped { end } => {
            let why = end.as_ref().map_or("nothing tells why", |end| end.message.as_str());
            AppError::Conflict {
                code: "vm_ended",
                message: format!("the VM ended while it was saved: {why}"),
                details: json!({ "reason": end.as_ref().map(|end| end.reason) }),
            }
        }
        Observed::Absent | Observed::Starting | Observed::Running | Observed::Paused | Observed::Unknown => {
            error.into()
        }
    }
}

/// Leaves nothing of a snapshot that was not saved; its lock is held. What fails here is logged and taken up by the
/// reconciler.
pub(crate) async fn discard(app: &App, id: &SnapshotId) {
    for state in [SnapshotState::Saving, SnapshotState::Ready] {
        match app.store.snapshot_transition(id, state, SnapshotEvent::Remove).await {
            Ok(Some(_)) => break,
            Ok(None) => {}
            Err(error) => {
                tracing::error!(snapshot_id = %id, error = chain(&error), "snapshot {id} can't be discarded now");
                return;
            }
        }
    }
    // Logged where it fails.
    let _ = remove(app, id).await;
}
