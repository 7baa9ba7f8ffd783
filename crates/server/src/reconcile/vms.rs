//! VMs: each one compared with what the engine sees of it.

use std::{collections::HashSet, sync::Arc, time::Duration};

use futures_util::{StreamExt, stream};
use tiffin_engine::{Ended, EngineError, Observed};
use tiffin_store::{Change, Vm};
use tiffin_types::{
    id::VmId,
    vm::{EndReport, VmState},
};

use super::{
    decide::{Action, Recorded, decide},
    snapshots,
};
use crate::{
    app::{
        App,
        vms::{destroy, discard, finish_stop, mark_deleted, record_end, service},
    },
    error::{AppError, chain},
};

/// VMs that one run looks at at once.
const AT_ONCE: usize = 16;

/// How often a VM that an earlier server left on its way up is looked at.
const STARTING_POLL: Duration = Duration::from_millis(250);

/// The first run, before the server listens: takes over what an earlier server left, and removes what no record
/// knows, as nothing can be on its way yet.
pub(crate) async fn adopt_all(app: &Arc<App>) -> Result<(), AppError> {
    let found = app.engine.adopt().await?;
    snapshots::undo_forks(app).await?;
    let recorded = app.store.vm_not_deleted().await?;
    let known: HashSet<_> = recorded.iter().map(|vm| &vm.id).collect();
    tracing::info!(found = found.len(), recorded = recorded.len(), "adopting VMs");
    for (id, _) in found.iter().filter(|(id, _)| !known.contains(id)) {
        tracing::warn!(vm_id = %id, "VM {id} is on the host and in no record; removing it");
        // What fails is tried again on the timer.
        let _ = destroy(app, id).await;
    }
    reconcile_each(app, &recorded).await;
    snapshots::reconcile_all(app).await
}

/// Follows the VMs that an earlier server left on their way up until they are up or down. Later starts are followed by
/// whoever started them.
pub(super) async fn settle_starting(app: Arc<App>) {
    loop {
        let recorded = app.store.vm_not_deleted().await.unwrap_or_else(|error| {
            tracing::error!(error = chain(&error), "VMs on their way up can't be followed now");
            Vec::new()
        });
        let is_left = |vm: &Vm| vm.state == VmState::Starting && app.locks.is_free(&vm.id);
        let starting: Vec<Vm> = recorded.into_iter().filter(is_left).collect();
        if starting.is_empty() {
            return;
        }
        reconcile_each(&app, &starting).await;
        tokio::time::sleep(STARTING_POLL).await;
    }
}

/// A run over all VMs.
pub(super) async fn reconcile_all(app: &Arc<App>) -> Result<(), AppError> {
    let undestroyed = app.undestroyed.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone();
    for id in &undestroyed {
        let _ = destroy(app, id).await;
    }
    app.pool.check(app).await;
    snapshots::undo_forks(app).await?;
    let mut recorded = app.store.vm_not_deleted().await?;
    // What is down on request has nothing that could drift; what is being changed is looked at the next time.
    recorded.retain(|vm| (vm.state != VmState::Stopped || vm.service.is_some()) && app.locks.is_free(&vm.id));
    reconcile_each(app, &recorded).await;
    snapshots::reconcile_all(app).await
}

/// Several at once: one that takes its time to stop must not keep the others waiting.
async fn reconcile_each(app: &Arc<App>, vms: &[Vm]) {
    stream::iter(vms).for_each_concurrent(AT_ONCE, |vm| reconcile_or_log(app, vm, None)).await;
}

/// A VM's run ended by itself.
pub(super) async fn end_noticed(app: &Arc<App>, ended: Ended) {
    let mut recorded = with_id(app, &ended.id).await;
    if recorded.is_none() {
        // It was booted ahead. Whoever is just claiming it makes its record before the lock is free.
        drop(app.locks.lock(&ended.id).await);
        recorded = with_id(app, &ended.id).await;
    }
    if app.prepared.forget(&ended.id) {
        app.prepared.look();
    }
    match recorded {
        Some(vm) => reconcile_or_log(app, &vm, Some(&ended.report)).await,
        None => app.pool.ended(app, &ended.id),
    }
}

async fn with_id(app: &App, id: &VmId) -> Option<Vm> {
    match app.store.vm_not_deleted().await {
        Ok(recorded) => recorded.into_iter().find(|vm| vm.id == *id),
        Err(error) => {
            // The timer's next run sees that it is down.
            tracing::error!(vm_id = %id, error = chain(&error), "the end of VM {id} can't be recorded yet");
            None
        }
    }
}

async fn reconcile_or_log(app: &Arc<App>, vm: &Vm, hint: Option<&EndReport>) {
    if let Err(error) = vm_reconcile(app, vm, hint).await {
        tracing::error!(vm_id = %vm.id, error = error.inside(), "VM {} can't be reconciled now", vm.id);
    }
}

/// Compares one VM with what the engine sees and acts on the difference, when nobody else is changing it.
pub(crate) async fn vm_reconcile(app: &Arc<App>, vm: &Vm, hint: Option<&EndReport>) -> Result<(), AppError> {
    let _lock = app.locks.lock(&vm.id).await;
    let Some(vm) = app.store.vm_get(&vm.account_id, &vm.id).await? else { return Ok(()) };
    let observed = app.engine.observe(&vm.id).await;
    match act(app, &vm, &observed, hint).await {
        // It is down again: what there was to go on with is over.
        Err(AppError::Boot(end)) => act(app, &vm, &Observed::Stopped { end: Some(end) }, None).await,
        outcome => outcome,
    }
}

async fn act(app: &Arc<App>, vm: &Vm, observed: &Observed, hint: Option<&EndReport>) -> Result<(), AppError> {
    let lifetime = vm.service.map(|service| service.lifetime);
    let recorded = Recorded { state: vm.state, was_up: vm.started_at.is_some(), lifetime };
    let action = decide(recorded, observed, hint);
    if action != Action::Nothing {
        tracing::info!(vm_id = %vm.id, state = vm.state.as_str(), "VM {} was seen as {observed:?}: {action:?}", vm.id);
    }
    match action {
        Action::Nothing => Ok(()),
        Action::Record(event) => {
            app.store.vm_transition(&vm.id, vm.state, event, Change::default()).await?;
            Ok(())
        }
        Action::End(report) => record_end(app, vm, report).await.map(drop),
        Action::FinishStart => service::finish_start(app, vm, observed).await.map(drop),
        Action::FinishStop => finish_stop(app, vm).await,
        Action::PutDown => put_down(app, vm).await,
        Action::Abandon(report) => {
            // First, so that being cut short here doesn't leave the key to a VM that is gone.
            app.store.idempotency_forget(&vm.id).await?;
            if mark_deleted(app, vm, Some(report)).await? { destroy(app, &vm.id).await } else { Ok(()) }
        }
        Action::Discard => discard(app, vm).await,
        Action::Remove => destroy(app, &vm.id).await,
    }
}

async fn put_down(app: &App, vm: &Vm) -> Result<(), AppError> {
    match app.engine.stop(&vm.id, Duration::ZERO).await {
        Ok(_) | Err(EngineError::Absent) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
