//! VMs: read, logged, removed here; made in [`create`] and [`fork`], brought up and down in [`run`].
//!
//! Invariants: the intent is in the store before the engine does anything; a state changes only by compare-and-set; a
//! change of one VM holds that VM's lock, deletion aside, which may come at any time and wins.

mod create;
pub(crate) mod fork;
mod restore;
mod run;
pub(crate) mod service;

use std::sync::Arc;

use serde_json::json;
use tiffin_engine::{Denied, EngineError, LogKind, LogTail};
use tiffin_store::{Change, Desired, Vm};
use tiffin_types::{
    account::Scope,
    id::VmId,
    vm::{EndReason, EndReport, VmEvent, VmSpec, VmState},
};

use super::{App, auth::Caller};
use crate::{
    error::{AppError, chain},
    fault,
};
pub(crate) use create::{Idempotent, VmRequest, vm_create};
pub(crate) use run::{finish_stop, vm_pause, vm_resume, vm_start, vm_stop};

/// The caller's VMs.
pub(crate) async fn vm_list(app: &App, caller: &Caller) -> Result<Vec<Vm>, AppError> {
    caller.require(Scope::Read)?;
    Ok(app.store.vm_list(&caller.account_id).await?)
}

/// One of the caller's VMs.
pub(crate) async fn vm_get(app: &App, caller: &Caller, id: &VmId) -> Result<Vm, AppError> {
    caller.require(Scope::Read)?;
    find(app, caller, id).await
}

/// The last lines of one of a VM's logs.
pub(crate) async fn vm_logs(
    app: &App,
    caller: &Caller,
    id: &VmId,
    kind: LogKind,
    lines: usize,
) -> Result<LogTail, AppError> {
    caller.require(Scope::Read)?;
    find(app, caller, id).await?;
    match app.engine.log_tail(id, kind, lines).await {
        // It has a record and no folder: it was never brought up, or the folder is lost.
        Err(EngineError::Absent) => Ok(LogTail::default()),
        tail => Ok(tail?),
    }
}

/// A VM, and what its network has refused.
pub(crate) async fn vm_network(app: &App, caller: &Caller, id: &VmId) -> Result<(Vm, Denied), AppError> {
    caller.require(Scope::Read)?;
    let vm = find(app, caller, id).await?;
    match app.engine.denied(id).await {
        // Nothing runs, so nothing is refused.
        Err(EngineError::Absent | EngineError::WrongState(_)) => Ok((vm, Denied::default())),
        denied => Ok((vm, denied?)),
    }
}

/// Removes a VM, in whatever state it is.
pub(crate) async fn vm_delete(app: &Arc<App>, caller: &Caller, id: &VmId) -> Result<(), AppError> {
    caller.require(Scope::Write)?;
    let (work, caller, id) = (Arc::clone(app), caller.clone(), id.clone());
    app.run(async move {
        let vm = loop {
            let vm = find(&work, &caller, &id).await?;
            if mark_deleted(&work, &vm, None).await? {
                break vm;
            }
        };
        fault::point("after_delete_intent");
        let destroyed = destroy(&work, &id).await;
        // Its image may have been replaced since, and be needed by nobody now.
        work.images.leaving.add(std::iter::once(vm.image_digest).chain(vm.kernel_digest));
        destroyed
    })
    .await
}

/// The caller's VM; a deleted one is not found.
async fn find(app: &App, caller: &Caller, id: &VmId) -> Result<Vm, AppError> {
    let vm = app.store.vm_get(&caller.account_id, id).await?;
    vm.filter(|vm| vm.state != VmState::Deleted).ok_or(AppError::NotFound("VM"))
}

/// Takes a VM to DELETED; `false` when it has moved meanwhile.
pub(crate) async fn mark_deleted(app: &App, vm: &Vm, end: Option<EndReport>) -> Result<bool, AppError> {
    let change = Change { end: end.map(Some), desired: Some(Desired::Deleted), ..Change::default() };
    Ok(app.store.vm_transition(&vm.id, vm.state, VmEvent::Delete, change).await?.is_some())
}

/// Removes what the engine has of a VM whose record says that it is gone. What fails is tried again by the reconciler.
pub(crate) async fn destroy(app: &App, id: &VmId) -> Result<(), AppError> {
    app.prepared.forget(id);
    let destroyed = app.engine.destroy(id).await;
    fault::point("after_engine_destroy");
    let mut undestroyed = app.undestroyed.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    match destroyed {
        Ok(()) => {
            undestroyed.remove(id);
            tracing::info!(vm_id = %id, "VM {id} deleted");
            Ok(())
        }
        Err(error) => {
            undestroyed.insert(id.clone());
            tracing::warn!(vm_id = %id, error = chain(&error), "VM {id} could not be removed from the host yet");
            Err(AppError::internal(format!("destroying VM {id}"), error))
        }
    }
}

/// Records the end of a VM's run; `false` when it has moved meanwhile.
pub(crate) async fn record_end(app: &App, vm: &Vm, report: EndReport) -> Result<bool, AppError> {
    let mut event = report.reason.event();
    if vm.state.after(event).is_none() {
        // A VM that never came up can only have failed.
        event = VmEvent::Fail;
    }
    if vm.state.after(event).is_none() {
        return Ok(false);
    }
    let reason = report.reason.as_str();
    let message = report.message.clone();
    let change = Change { end: Some(Some(report)), desired: Some(Desired::Stopped), ..Change::default() };
    let Some(now) = app.store.vm_transition(&vm.id, vm.state, event, change).await? else { return Ok(false) };
    crate::metrics::vm_end(reason);
    tracing::info!(vm_id = %vm.id, reason, state = now.state.as_str(), "VM {} ended: {message}", vm.id);
    fault::point("after_end_recorded");
    if now.is_one_time() {
        discard(app, &now).await?;
    }
    app.prepared.look();
    Ok(true)
}

/// Removes a VM that was for one run, which is over. Its record says how it ended.
pub(crate) async fn discard(app: &App, vm: &Vm) -> Result<(), AppError> {
    if mark_deleted(app, vm, None).await? { destroy(app, &vm.id).await } else { Ok(()) }
}

/// What the engine is told of a VM.
pub(crate) fn spec_of(vm: &Vm) -> VmSpec {
    VmSpec {
        id: vm.id.clone(),
        image: vm.image_digest.clone(),
        kernel: vm.kernel_digest.clone(),
        size: vm.size,
        egress: vm.egress.clone(),
        engine: vm.engine,
        program: None,
    }
}

/// A refusal that names the state, and the states in which it would work.
pub(crate) fn wrong_state(vm: &Vm, wanted: &str) -> AppError {
    AppError::Conflict {
        code: "wrong_state",
        message: format!("the VM is {}; this needs a VM that is {wanted}", vm.state),
        details: json!({ "state": vm.state }),
    }
}

/// A report of a failure that nobody typed more precisely.
pub(crate) fn report(reason: EndReason, message: impl Into<String>) -> EndReport {
    EndReport { reason, message: message.into(), exit_code: None }
}
