//! Forking a VM: as many running clones as asked for, or none.
//!
//! The source is saved into a snapshot that is nobody's to see, the clones are restored from it, and it goes. As long as
//! its record isn't DELETING the fork isn't done: whoever finds it so after a restart undoes it all ([`undo`]). One commit
//! makes all clones RUNNING and the snapshot DELETING.

use std::{sync::Arc, time::Instant};

use futures_util::future::join_all;
use tiffin_engine::Kind;
use tiffin_store::{Forked, NewFork, Vm};
use tiffin_types::{
    account::Scope,
    id::{SnapshotId, VmId},
    network::EgressPolicy,
    snapshot::SnapshotState,
    vm::{EndReport, VmEvent, VmState},
};

use super::{
    App, Caller, Idempotent,
    create::{Attempt, REPLAY_POLL, end_of, frees_key},
    destroy, mark_deleted, restore,
    run::{From, note_start, up},
};
use crate::{
    app::snapshots::{
        can_snapshot, remove,
        save::{discard, hold_running, new_snapshot, running, save},
    },
    error::{AppError, chain},
    fault,
};

/// What to make of a VM; its fields are within their ranges.
#[derive(Debug, Clone)]
pub(crate) struct ForkRequest {
    pub(crate) count: u32,
    /// `None`: the source's.
    pub(crate) egress: Option<EgressPolicy>,
}

/// Makes clones of a running VM, which runs on, and answers when all of them run.
pub(crate) async fn vm_fork(
    app: &Arc<App>,
    caller: &Caller,
    id: &VmId,
    request: ForkRequest,
    idempotent: Option<Idempotent>,
) -> Result<Vec<Vm>, AppError> {
    caller.require(Scope::Write)?;
    let (work, caller, id) = (Arc::clone(app), caller.clone(), id.clone());
    app.run(async move {
        match attempt(&work, &caller, &id, &request, idempotent.as_ref()).await? {
            Attempt::Made(clones) => Ok(clones),
            // If the first one's failure was one that passes, its key is free again and this makes the clones.
            Attempt::FirstFailed(_) => match attempt(&work, &caller, &id, &request, idempotent.as_ref()).await? {
                Attempt::Made(clones) => Ok(clones),
                Attempt::FirstFailed(end) => Err(AppError::Boot(end)),
            },
        }
    })
    .await
}

async fn attempt(
    app: &App,
    caller: &Caller,
    id: &VmId,
    request: &ForkRequest,
    idempotent: Option<&Idempotent>,
) -> Result<Attempt<Vec<Vm>>, AppError> {
    // Before all else: the source may be gone by now.
    if let Some(idempotent) = idempotent
        && let Some(known) = app.store.fork_replay(&caller.account_id, idempotent.into()).await?
    {
        return answer_to(app, caller, known).await;
    }
    running(app, caller, id).await?;
    let (source_lock, source) = hold_running(app, caller, id).await?;
    let new = new_fork(can_snapshot(app, source.engine)?, &source, request);
    let snapshot = &new.snapshot.id;
    // The reconciler leaves what is locked alone.
    let _lock = app.snapshot_locks.lock(snapshot).await;
    let _locks = join_all(new.vms.iter().map(|vm| app.locks.lock(&vm.id))).await;
    let place = app.places.take().await?;
    let account = app.store.account_get(&caller.account_id).await?.ok_or(AppError::NotFound("account"))?;
    let clones = match app.store.fork_insert(&new, &account.quota, idempotent.map(Into::into)).await? {
        Forked::New(clones) => clones,
        other => {
            drop((place, source_lock));
            return answer_to(app, caller, other).await;
        }
    };
    tracing::info!(vm_id = %id, clones = clones.len(), "forking VM {id}");
    fault::point("after_fork_insert");
    let saved = save(app, &source, snapshot).await;
    drop((place, source_lock));
    let made = match saved {
        Ok(_) => make(app, snapshot, &clones).await,
        Err(failure) => Err(failure),
    };
    match &made {
        // Logged where it fails, and tried again by the reconciler: the clones are there.
        Ok(_) => drop(remove(app, snapshot).await),
        Err(failure) => {
            if let Err(error) = undo(app, snapshot, &end_of(failure), frees_key(failure)).await {
                tracing::error!(vm_id = %id, error = error.inside(), "what is left of a fork of {id} can't be removed now");
            }
        }
    }
    made.map(Attempt::Made)
}

async fn answer_to(app: &App, caller: &Caller, forked: Forked) -> Result<Attempt<Vec<Vm>>, AppError> {
    match forked {
        Forked::New(clones) => Ok(Attempt::Made(clones)),
        Forked::Replay(clones) => replay(app, caller, clones).await,
        Forked::KeyReused => Err(AppError::key_reused()),
        Forked::OverQuota(over) => Err(AppError::OverQuota(over)),
    }
}

fn new_fork(kind: Kind, source: &Vm, request: &ForkRequest) -> NewFork {
    let snapshot = new_snapshot(source, None);
    let egress = request.egress.as_ref().unwrap_or(&source.egress);
    let vms = (0..request.count).map(|_| restore::of_saved(kind, &snapshot, egress.clone())).collect();
    NewFork { snapshot, vms }
}

/// Brings all clones up, and makes them RUNNING at once.
async fn make(app: &App, snapshot: &SnapshotId, clones: &[Vm]) -> Result<Vec<Vm>, AppError> {
    let mut starting = Vec::with_capacity(clones.len());
    for outcome in join_all(clones.iter().map(|clone| start(app, clone))).await {
        starting.push(outcome?);
    }
    fault::point("before_fork_commit");
    let running = app.store.fork_commit(snapshot, &starting).await?;
    fault::point("after_running_commit");
    running.ok_or_else(|| AppError::Conflict {
        code: "clone_deleted",
        message: "one of the clones was deleted while they came up, and the others are removed too".into(),
        details: serde_json::Value::Null,
    })
}

async fn start(app: &App, clone: &Vm) -> Result<Vm, AppError> {
    let began = Instant::now();
    let outcome = async {
        let _place = app.places.take().await?;
        let starting = app.store.vm_transition(&clone.id, VmState::Created, VmEvent::Start, Default::default()).await?;
        let starting = starting.ok_or(AppError::NotFound("VM"))?;
        fault::point("after_start_intent");
        up(app, &starting, From::Snapshot).await?;
        Ok(starting)
    };
    let outcome = outcome.await;
    note_start(&outcome, began);
    outcome
}

/// Removes all that a fork that isn't done has made: its clones and its snapshot, whose lock is held. Whoever
/// deletes a clone first has destroyed it, maybe before the engine had made it all: so each one is destroyed here.
pub(crate) async fn undo(app: &App, snapshot: &SnapshotId, end: &EndReport, free_key: bool) -> Result<(), AppError> {
    for clone in app.store.vm_list_of_snapshot(snapshot).await? {
        if free_key && let Err(error) = app.store.idempotency_forget(&clone.id).await {
            tracing::warn!(vm_id = %clone.id, error = chain(&error), "the idempotency key of a fork stays taken");
        }
        mark_gone(app, &clone, end).await?;
        // Logged where it fails.
        let _ = destroy(app, &clone.id).await;
    }
    discard(app, snapshot).await;
    Ok(())
}

/// Takes a VM to DELETED, in whichever state it is by then.
async fn mark_gone(app: &App, clone: &Vm, end: &EndReport) -> Result<(), AppError> {
    let mut clone = clone.clone();
    while clone.state != VmState::Deleted && !mark_deleted(app, &clone, Some(end.clone())).await? {
        let Some(now) = app.store.vm_get(&clone.account_id, &clone.id).await? else { return Ok(()) };
        clone = now;
    }
    Ok(())
}

/// Waits for the request that came first, and answers as it did.
async fn replay(app: &App, caller: &Caller, first: Vec<Vm>) -> Result<Attempt<Vec<Vm>>, AppError> {
    let vm = &app.config.vm;
    let patience = vm.snapshot_timeout + vm.start_timeout + app.config.limits.create_wait;
    let settled = async {
        let mut clones = first;
        while clones.iter().any(|clone| matches!(clone.state, VmState::Created | VmState::Starting)) {
            tokio::time::sleep(REPLAY_POLL).await;
            for clone in &mut clones {
                let now = app.store.vm_get(&caller.account_id, &clone.id).await?;
                *clone = now.ok_or(AppError::NotFound("VM"))?;
            }
        }
        Ok::<_, AppError>(clones)
    };
    let clones = tokio::time::timeout(patience, settled).await.map_err(|_| AppError::Unavailable {
        code: "busy",
        message: "the first request with this Idempotency-Key is still in progress; try again shortly".into(),
    })??;
    match clones.iter().find(|clone| clone.started_at.is_none()) {
        Some(Vm { end: Some(end), .. }) => Ok(Attempt::FirstFailed(end.clone())),
        Some(_) => Err(AppError::NotFound("VM")),
        None => Ok(Attempt::Made(clones)),
    }
}

/// Whether a fork that has a record in that state is done, but for its snapshot's removal.
pub(crate) fn is_done(state: SnapshotState) -> bool {
    match state {
        SnapshotState::Deleting => true,
        SnapshotState::Saving | SnapshotState::Ready | SnapshotState::Lost => false,
    }
}
