//! Bringing VMs up and down, freezing them and letting them go on.

use std::{sync::Arc, time::Instant};

use tiffin_engine::{EngineError, Observed};
use tiffin_store::{Change, Desired, Reserve, Vm};
use tiffin_types::{
    account::Scope,
    id::VmId,
    program::Program,
    vm::{EndReason, EndReport, EngineName, ProvisionMode, VmEvent, VmState},
};
use tokio::sync::OwnedRwLockWriteGuard;

use super::{App, Caller, find, record_end, report, service, spec_of, wrong_state};
use crate::{error::AppError, fault, metrics};

/// Brings a VM up that is STOPPED or in ERROR.
pub(crate) async fn vm_start(app: &Arc<App>, caller: &Caller, id: &VmId) -> Result<(), AppError> {
    caller.require(Scope::Write)?;
    let (work, caller, id) = (Arc::clone(app), caller.clone(), id.clone());
    app.run(async move {
        let (_lock, vm) = hold(&work, &caller, &id, VmEvent::Start).await?;
        let _place = work.places.take().await?;
        let account = work.store.account_get(&caller.account_id).await?.ok_or(AppError::NotFound("account"))?;
        match work.store.vm_start_reserve(&id, vm.state, &account.quota).await? {
            Reserve::Reserved(starting) => {
                fault::point("after_start_intent");
                work.prepared.forget(&id);
                start_reserved(&work, &starting).await
            }
            Reserve::Lost => Err(lost(&work, &caller, &id).await),
            Reserve::OverQuota(over) => Err(AppError::OverQuota(over)),
        }
    })
    .await
}

async fn start_reserved(app: &App, starting: &Vm) -> Result<(), AppError> {
    let Err(failure) = bring_up(app, starting, From::Itself).await else { return Ok(()) };
    let end = match &failure {
        AppError::Boot(end) => end.clone(),
        AppError::Unavailable { message, .. } => report(EndReason::BootFailed, message.clone()),
        _ => report(EndReason::BootFailed, "The host failed while bringing it up."),
    };
    if !record_end(app, starting, end).await? {
        // Deleted meanwhile; the engine may have made parts of it after that.
        let _ = super::destroy(app, &starting.id).await;
        return Err(AppError::NotFound("VM"));
    }
    Err(failure)
}

/// What a VM comes up from.
#[derive(Debug, Clone, Copy)]
pub(super) enum From<'a> {
    /// What there is of it, else its image.
    Itself,
    /// The snapshot that its record names, which is there and stays until it is up; its image, if it names none.
    Snapshot,
    /// Its image, to run this program.
    Image(&'a Program),
}

/// Has the engine make (if need be) and start a VM that is STARTING, and takes it to RUNNING. On failure it is down,
/// and its record is the caller's to settle.
pub(super) async fn bring_up(app: &App, starting: &Vm, from: From<'_>) -> Result<Vm, AppError> {
    let began = Instant::now();
    let outcome = match up(app, starting, from).await {
        Ok(mode) => commit_running(app, starting, mode).await,
        Err(error) => Err(error),
    };
    note_start(&outcome, began);
    outcome
}

/// As [`bring_up`], without a change of the record. Tells how it came up, unless it was up already.
pub(super) async fn up(app: &App, starting: &Vm, from: From<'_>) -> Result<Option<ProvisionMode>, AppError> {
    match tokio::time::timeout(app.config.vm.start_timeout, engine_up(app, starting, from)).await {
        Ok(Ok(mode)) => Ok(mode),
        Ok(Err(error)) => Err(AppError::from(error)),
        Err(_) => Err(AppError::Boot(too_slow(app, starting).await)),
    }
}

/// Counts an attempt to bring a VM up.
pub(super) fn note_start<T>(outcome: &Result<T, AppError>, began: Instant) {
    let word = match outcome {
        Ok(_) => "ok",
        Err(AppError::Boot(end)) => end.reason.as_str(),
        Err(AppError::Unavailable { code, .. } | AppError::Unprocessable { code, .. }) => code,
        Err(AppError::NotFound(_)) => "deleted",
        Err(_) => "internal",
    };
    metrics::vm_start(word, began.elapsed());
}

/// Ends VMs that were booted ahead of their use; whether there were any.
async fn make_room(app: &App, for_one: &Vm) -> bool {
    let pooled = app.pool.make_room(app).await;
    app.prepared.make_room(app, &for_one.id).await || pooled
}

/// VMs that were booted ahead make room for one that somebody waits for.
async fn engine_up(app: &App, vm: &Vm, from: From<'_>) -> Result<Option<ProvisionMode>, EngineError> {
    match engine_up_once(app, vm, from).await {
        Err(EngineError::NoCapacity(_)) if make_room(app, vm).await => engine_up_once(app, vm, from).await,
        outcome => outcome,
    }
}

async fn engine_up_once(app: &App, vm: &Vm, from: From<'_>) -> Result<Option<ProvisionMode>, EngineError> {
    let (began, mut mode) = (Instant::now(), None);
    if !goes_on(app, vm, from).await? {
        match (from, &vm.snapshot_id) {
            (From::Snapshot, Some(snapshot)) => app.engine.create_from(&spec_of(vm), snapshot).await?,
            (From::Image(program), _) => service::engine_create(app, vm, program).await?,
            // It has been made, with a program that is nowhere else.
            (From::Itself, _) if vm.service.is_some() => {}
            (From::Snapshot, None) | (From::Itself, _) => app.engine.create(&spec_of(vm)).await?,
        }
        fault::point("after_engine_create");
        let started = app.engine.start(&vm.id).await?;
        mode = Some(if started.from_saved { ProvisionMode::Snapshot } else { ProvisionMode::Boot });
        fault::point("after_engine_start");
    }
    if vm.service.is_some() {
        app.engine.program_start(&vm.id).await?;
        fault::point("after_program_start");
    }
    tracing::info!(vm_id = %vm.id, took_ms = began.elapsed().as_millis(), "VM {} is up", vm.id);
    Ok(mode)
}

/// Lets a cached VM go on that was prepared; whether it was.
async fn goes_on(app: &App, vm: &Vm, from: From<'_>) -> Result<bool, EngineError> {
    let prepared = match from {
        From::Itself => vm.is_cached() && app.engine.observe(&vm.id).await == Observed::Paused,
        From::Snapshot | From::Image(_) => false,
    };
    if prepared {
        app.engine.resume(&vm.id).await?;
    }
    Ok(prepared)
}

/// Takes a VM that is up to RUNNING; `mode` says how it came up, unless its record does.
pub(super) async fn commit_running(app: &App, starting: &Vm, mode: Option<ProvisionMode>) -> Result<Vm, AppError> {
    fault::point("before_running_commit");
    let change = Change { provision_mode: mode, ..Change::default() };
    let running = app.store.vm_transition(&starting.id, VmState::Starting, VmEvent::Ready, change).await?;
    fault::point("after_running_commit");
    // It was deleted while it came up.
    running.ok_or(AppError::NotFound("VM"))
}

/// The engine's own limit is shorter; a start that overruns this one is put down.
async fn too_slow(app: &App, vm: &Vm) -> EndReport {
    if let Err(error) = app.engine.stop(&vm.id, std::time::Duration::ZERO).await {
        tracing::warn!(vm_id = %vm.id, error = crate::error::chain(&error), "VM {} can't be put down", vm.id);
    }
    let limit_ms = app.config.vm.start_timeout.as_millis();
    report(EndReason::BootTimeout, format!("It was not up after {limit_ms} ms."))
}

/// Shuts a VM down; its disk stays.
pub(crate) async fn vm_stop(app: &Arc<App>, caller: &Caller, id: &VmId) -> Result<(), AppError> {
    caller.require(Scope::Write)?;
    let (work, caller, id) = (Arc::clone(app), caller.clone(), id.clone());
    app.run(async move {
        let (_lock, vm) = hold(&work, &caller, &id, VmEvent::Stop).await?;
        let change = Change { desired: Some(Desired::Stopped), ..Change::default() };
        let stopping = work.store.vm_transition(&id, vm.state, VmEvent::Stop, change).await?;
        let Some(stopping) = stopping else { return Err(lost(&work, &caller, &id).await) };
        fault::point("after_stop_intent");
        finish_stop(&work, &stopping).await
    })
    .await
}

/// Has the engine stop a VM that is STOPPING, and records its end.
pub(crate) async fn finish_stop(app: &App, stopping: &Vm) -> Result<(), AppError> {
    let end = match app.engine.stop(&stopping.id, app.config.vm.stop_grace).await {
        Ok(end) => end,
        Err(error) => match app.engine.observe(&stopping.id).await {
            Observed::Stopped { end } => end.unwrap_or_else(|| report(EndReason::Requested, "Stopped on request.")),
            Observed::Absent => report(EndReason::EngineLost, "Nothing of it was found on the host."),
            // It stays STOPPING; the reconciler goes on.
            Observed::Starting | Observed::Running | Observed::Paused | Observed::Unknown => return Err(error.into()),
        },
    };
    fault::point("after_engine_stop");
    match record_end(app, stopping, end).await? {
        true => Ok(()),
        false => Err(AppError::NotFound("VM")),
    }
}

/// Freezes a running VM.
pub(crate) async fn vm_pause(app: &Arc<App>, caller: &Caller, id: &VmId) -> Result<(), AppError> {
    caller.require(Scope::Write)?;
    let (work, caller, id) = (Arc::clone(app), caller.clone(), id.clone());
    app.run(async move {
        let (_lock, vm) = hold(&work, &caller, &id, VmEvent::Pause).await?;
        can_pause(&work, vm.engine)?;
        work.engine.pause(&id).await?;
        match work.store.vm_transition(&id, vm.state, VmEvent::Pause, Change::default()).await? {
            Some(_) => Ok(()),
            None => Err(lost(&work, &caller, &id).await),
        }
    })
    .await
}

/// Lets a paused VM go on.
pub(crate) async fn vm_resume(app: &Arc<App>, caller: &Caller, id: &VmId) -> Result<(), AppError> {
    caller.require(Scope::Write)?;
    let (work, caller, id) = (Arc::clone(app), caller.clone(), id.clone());
    app.run(async move {
        let (_lock, vm) = hold(&work, &caller, &id, VmEvent::Resume).await?;
        can_pause(&work, vm.engine)?;
        work.engine.resume(&id).await?;
        match work.store.vm_transition(&id, vm.state, VmEvent::Resume, Change::default()).await? {
            Some(_) => Ok(()),
            None => Err(lost(&work, &caller, &id).await),
        }
    })
    .await
}

fn can_pause(app: &App, engine: EngineName) -> Result<(), AppError> {
    match app.engine.capabilities(engine).pause {
        true => Ok(()),
        false => Err(AppError::Unprocessable {
            code: "unsupported",
            message: format!("the engine {} can't pause VMs", engine.as_str()),
        }),
    }
}

/// The VM and its lock, when its state allows `event`. Asks before it waits too, so that a refusal is quick.
async fn hold(
    app: &App,
    caller: &Caller,
    id: &VmId,
    event: VmEvent,
) -> Result<(OwnedRwLockWriteGuard<()>, Vm), AppError> {
    able(&find(app, caller, id).await?, event)?;
    let lock = app.locks.lock(id).await;
    let vm = find(app, caller, id).await?;
    able(&vm, event)?;
    Ok((lock, vm))
}

fn able(vm: &Vm, event: VmEvent) -> Result<(), AppError> {
    if vm.state.after(event).is_some() {
        return Ok(());
    }
    let able: Vec<&str> =
        VmState::ALL.into_iter().filter(|state| state.after(event).is_some()).map(VmState::as_str).collect();
    Err(wrong_state(vm, &able.join(" or ")))
}

/// What to say when somebody else moved the VM first.
async fn lost(app: &App, caller: &Caller, id: &VmId) -> AppError {
    match find(app, caller, id).await {
        Ok(vm) => wrong_state(&vm, "not being changed by somebody else"),
        Err(error) => error,
    }
}
