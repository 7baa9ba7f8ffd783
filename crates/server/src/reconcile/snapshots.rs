//! Snapshots: each record compared with what the engine has.
//!
//! A record that is SAVING or DELETING and whose lock nobody holds was left by somebody who failed or was killed, and so
//! was a fork that isn't done: it is removed. What the engine has without a record is removed. A READY one that the engine
//! doesn't have is LOST, which is undone when it is there after all (a disk that wasn't mounted).

use std::collections::HashSet;

use tiffin_store::Snapshot;
use tiffin_types::{
    id::SnapshotId,
    snapshot::{SnapshotEvent, SnapshotState},
    vm::EndReason,
};

use crate::{
    app::{
        App,
        snapshots::{remove, save::discard},
        vms::{fork, report},
    },
    error::{AppError, chain},
};

/// Undoes every fork that was cut short. Before VMs are looked at: the clones of one must not be taken for VMs that came up.
pub(super) async fn undo_forks(app: &App) -> Result<(), AppError> {
    let recorded = app.store.snapshot_all().await?;
    for left in recorded.iter().filter(|snapshot| snapshot.fork && !fork::is_done(snapshot.state)) {
        if !app.snapshot_locks.is_free(&left.id) {
            continue;
        }
        let _lock = app.snapshot_locks.lock(&left.id).await;
        let Some(now) = again(app, &left.id).await? else { continue };
        if fork::is_done(now.state) {
            continue;
        }
        tracing::warn!(vm_id = %now.vm_id, snapshot_id = %now.id, "a fork of VM {} was cut short; undoing it", now.vm_id);
        let end = report(EndReason::BootFailed, "The server restarted while the fork was under way.");
        fork::undo(app, &now.id, &end, true).await?;
    }
    Ok(())
}

/// A run over all snapshots.
pub(super) async fn reconcile_all(app: &App) -> Result<(), AppError> {
    // Read before and after the engine is asked: what was READY before must be there, what has no record after may not.
    let before = app.store.snapshot_all().await?;
    let present: HashSet<SnapshotId> = match app.engine.snapshot_list().await {
        Ok(list) => list.into_iter().collect(),
        Err(error) => {
            tracing::error!(error = chain(&error), "the host can't be asked for its snapshots now");
            return Ok(());
        }
    };
    let after = app.store.snapshot_all().await?;
    let known: HashSet<&SnapshotId> = after.iter().map(|snapshot| &snapshot.id).collect();
    for stray in present.iter().filter(|id| !known.contains(id)) {
        tracing::warn!(snapshot_id = %stray, "snapshot {stray} is on the host and in no record; removing it");
        if let Err(error) = app.engine.snapshot_remove(stray).await {
            tracing::warn!(snapshot_id = %stray, error = chain(&error), "snapshot {stray} could not be removed yet");
        }
    }
    for snapshot in &before {
        if let Err(error) = reconcile(app, snapshot, present.contains(&snapshot.id)).await {
            let id = &snapshot.id;
            tracing::error!(snapshot_id = %id, error = error.inside(), "snapshot {id} can't be reconciled now");
        }
    }
    Ok(())
}

async fn reconcile(app: &App, snapshot: &Snapshot, present: bool) -> Result<(), AppError> {
    let id = &snapshot.id;
    match (snapshot.state, present) {
        (SnapshotState::Ready, true) | (SnapshotState::Lost, false) => Ok(()),
        (SnapshotState::Ready, false) => {
            if app.store.snapshot_transition(id, snapshot.state, SnapshotEvent::Lost).await?.is_some() {
                tracing::error!(snapshot_id = %id, "the files of snapshot {id} are not on the host: it can't be restored");
            }
            Ok(())
        }
        (SnapshotState::Lost, true) => {
            if app.store.snapshot_transition(id, snapshot.state, SnapshotEvent::Found).await?.is_some() {
                tracing::info!(snapshot_id = %id, "the files of snapshot {id} are there again");
            }
            Ok(())
        }
        (SnapshotState::Saving | SnapshotState::Deleting, _) => settle(app, id).await,
    }
}

/// Removes what somebody has left half done.
async fn settle(app: &App, id: &SnapshotId) -> Result<(), AppError> {
    if !app.snapshot_locks.is_free(id) {
        return Ok(());
    }
    let _lock = app.snapshot_locks.lock(id).await;
    match again(app, id).await?.map(|snapshot| snapshot.state) {
        Some(SnapshotState::Saving) => {
            tracing::warn!(snapshot_id = %id, "snapshot {id} was cut short; removing it");
            discard(app, id).await;
            Ok(())
        }
        Some(SnapshotState::Deleting) => remove(app, id).await,
        Some(SnapshotState::Ready | SnapshotState::Lost) | None => Ok(()),
    }
}

/// The record as it is now.
async fn again(app: &App, id: &SnapshotId) -> Result<Option<Snapshot>, AppError> {
    Ok(app.store.snapshot_all().await?.into_iter().find(|snapshot| snapshot.id == *id))
}
