//! Snapshots: listed and removed here, saved in [`save`]; VMs are made of them in `vms/restore.rs`.
//!
//! Invariants: there is a record before the engine has anything, and until it has nothing any more; a snapshot is not
//! removed while a VM is made of it (its lock); one that is SAVING, DELETING or a fork's is nobody's to see.

pub(crate) mod save;

use std::sync::Arc;

use tiffin_engine::Kind;
use tiffin_store::Snapshot;
use tiffin_types::{
    account::Scope,
    id::SnapshotId,
    snapshot::{SnapshotEvent, SnapshotState},
    vm::EngineName,
};

use super::{App, auth::Caller};
use crate::{
    error::{AppError, chain},
    fault,
};
pub(crate) use save::snapshot_create;

/// The caller's snapshots.
pub(crate) async fn snapshot_list(app: &App, caller: &Caller) -> Result<Vec<Snapshot>, AppError> {
    caller.require(Scope::Read)?;
    let mut list = app.store.snapshot_list(&caller.account_id).await?;
    list.retain(is_shown);
    Ok(list)
}

/// One of the caller's snapshots.
pub(crate) async fn snapshot_get(app: &App, caller: &Caller, id: &SnapshotId) -> Result<Snapshot, AppError> {
    caller.require(Scope::Read)?;
    find(app, caller, id).await
}

/// Removes a snapshot. VMs that were made of it are not concerned.
pub(crate) async fn snapshot_delete(app: &Arc<App>, caller: &Caller, id: &SnapshotId) -> Result<(), AppError> {
    caller.require(Scope::Write)?;
    let (work, caller, id) = (Arc::clone(app), caller.clone(), id.clone());
    app.run(async move {
        loop {
            let snapshot = find(&work, &caller, &id).await?;
            if work.store.snapshot_transition(&id, snapshot.state, SnapshotEvent::Remove).await?.is_some() {
                break;
            }
        }
        fault::point("after_snapshot_delete_intent");
        // VMs that are being made of it have it for as long as they need it.
        let _lock = work.snapshot_locks.lock(&id).await;
        remove(&work, &id).await
    })
    .await
}

/// Removes what the engine has of a snapshot that is DELETING, and then its record. What fails is tried again by the
/// reconciler.
pub(crate) async fn remove(app: &App, id: &SnapshotId) -> Result<(), AppError> {
    if let Err(error) = app.engine.snapshot_remove(id).await {
        tracing::warn!(snapshot_id = %id, error = chain(&error), "snapshot {id} could not be removed from the host yet");
        return Err(AppError::internal(format!("removing snapshot {id}"), error));
    }
    fault::point("after_engine_snapshot_remove");
    app.store.snapshot_forget(id).await?;
    tracing::info!(snapshot_id = %id, "snapshot {id} removed");
    Ok(())
}

/// The caller's snapshot, if it is one to be seen.
pub(super) async fn find(app: &App, caller: &Caller, id: &SnapshotId) -> Result<Snapshot, AppError> {
    let snapshot = app.store.snapshot_get(&caller.account_id, id).await?;
    snapshot.filter(is_shown).ok_or(AppError::NotFound("snapshot"))
}

fn is_shown(snapshot: &Snapshot) -> bool {
    match snapshot.state {
        SnapshotState::Ready | SnapshotState::Lost => true,
        SnapshotState::Saving | SnapshotState::Deleting => false,
    }
}

/// The kind of VM that can be saved and restored by that engine, which is refused where it has no snapshots.
pub(super) fn can_snapshot(app: &App, engine: EngineName) -> Result<Kind, AppError> {
    match app.engine.kind(engine) {
        Some(kind) if kind.capabilities.snapshot => Ok(kind),
        _ => Err(AppError::Unprocessable {
            code: "unsupported",
            message: format!("the engine {} has no snapshots", engine.as_str()),
        }),
    }
}
