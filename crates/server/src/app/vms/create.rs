//! Making a VM, from the request to RUNNING, at most once for each idempotency key.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tiffin_store::{Idempotency, Inserted, NewVm, Vm};
use tiffin_types::{
    account::Scope,
    id::{ImageId, SnapshotId, VmId},
    limits,
    network::EgressPolicy,
    program::Program,
    vm::{EndReason, EndReport, EngineName, ProvisionMode, Service, VmEvent, VmSize, VmState},
};
use tokio::sync::OwnedRwLockWriteGuard;

use super::{
    App, Caller, mark_deleted, report, restore,
    run::{From, bring_up},
    service::{self, program_of},
};
use crate::{
    app::{
        images::{image_for, kind_for, require_whole, still_has},
        places::Place,
        pool::Claimed,
    },
    error::{AppError, chain},
    fault,
};

/// How often a repeated request looks whether the first one is done.
pub(super) const REPLAY_POLL: Duration = Duration::from_millis(50);

/// A VM to be made; its fields are within their ranges. Not to be shown: an environment is secret.
#[derive(Clone)]
pub(crate) struct VmRequest {
    pub(crate) cpus: u32,
    pub(crate) mem_mb: u32,
    /// `None`: the snapshot's, or the default.
    pub(crate) disk_mb: Option<u32>,
    pub(crate) egress: EgressPolicy,
    /// `None`: the host's first.
    pub(crate) engine: Option<EngineName>,
    pub(crate) image_id: Option<ImageId>,
    pub(crate) snapshot_id: Option<SnapshotId>,
    /// Beyond a sandbox: what it serves, and the environment that its program gets beyond the image's.
    pub(crate) service: Option<(Service, BTreeMap<String, String>)>,
}

/// A VM's record to be, and the program that it runs if it runs one.
struct Wanted {
    new: NewVm,
    program: Option<Program>,
}

/// The client's name for a request that it may repeat, and what it asked for.
pub(crate) struct Idempotent {
    pub(crate) key: String,
    pub(crate) request_sha256: [u8; 32],
}

impl<'a> std::convert::From<&'a Idempotent> for Idempotency<'a> {
    fn from(request: &'a Idempotent) -> Self {
        Self { key: &request.key, request_sha256: request.request_sha256 }
    }
}

/// Makes a VM and answers when it is RUNNING. When it doesn't come up, nothing is left of it.
pub(crate) async fn vm_create(
    app: &Arc<App>,
    caller: &Caller,
    request: VmRequest,
    idempotent: Option<Idempotent>,
) -> Result<Vm, AppError> {
    caller.require(Scope::Write)?;
    let (work, caller) = (Arc::clone(app), caller.clone());
    app.run(async move {
        match attempt(&work, &caller, &request, idempotent.as_ref()).await? {
            Attempt::Made(vm) => Ok(*vm),
            // If the first one's failure was one that passes, its key is free again and this makes the VM.
            Attempt::FirstFailed(_) => match attempt(&work, &caller, &request, idempotent.as_ref()).await? {
                Attempt::Made(vm) => Ok(*vm),
                Attempt::FirstFailed(end) => Err(AppError::Boot(end)),
            },
        }
    })
    .await
}

async fn wanted(app: &App, caller: &Caller, request: &VmRequest) -> Result<Wanted, AppError> {
    if let Some(id) = &request.snapshot_id {
        return Ok(Wanted { new: restore::new_vm(app, caller, id, request).await?, program: None });
    }
    let (image, digest) = image_for(app, caller, request.image_id.as_ref()).await?;
    let program = match &request.service {
        Some((_, env)) => Some(program_of(&image, env)?),
        None => None,
    };
    let kind = kind_for(app, request.engine, image.kernel_digest.as_ref())?;
    let disk_mb = request.disk_mb.unwrap_or(limits::DISK_MB_DEFAULT);
    let new = NewVm {
        id: VmId::random(),
        account_id: caller.account_id.clone(),
        image_id: image.id,
        image_digest: digest,
        kernel_digest: image.kernel_digest,
        engine: kind.name,
        isolation: kind.isolation,
        size: VmSize { cpus: request.cpus, mem_mb: request.mem_mb, disk_mb },
        egress: request.egress.clone(),
        provision_mode: ProvisionMode::Boot,
        snapshot_id: None,
        service: request.service.as_ref().map(|(service, _)| *service),
    };
    Ok(Wanted { new, program })
}

/// How a VM's record begins.
enum Begins {
    /// It is to be brought up.
    Created,
    /// It is up.
    Running,
}

/// What a request came to.
pub(super) enum Attempt<T> {
    /// What was asked for, by this request or by an earlier one with the same key.
    Made(T),
    /// What the earlier request began didn't come up.
    FirstFailed(EndReport),
}

async fn attempt(
    app: &Arc<App>,
    caller: &Caller,
    request: &VmRequest,
    idempotent: Option<&Idempotent>,
) -> Result<Attempt<Box<Vm>>, AppError> {
    // Before all else: what the first request was made of may be gone by now.
    if let Some(idempotent) = idempotent
        && let Some(known) = app.store.vm_replay(&caller.account_id, idempotent.into()).await?
    {
        return answer_to(app, caller, known).await;
    }
    let Wanted { new, program } = &wanted(app, caller, request).await?;
    require_whole(app, new)?;
    if let Some(claimed) = app.pool.claim(app, new).await {
        return attempt_with(app, caller, new, idempotent, claimed).await;
    }
    // Until it is up: a removal of the snapshot waits for that.
    let _source = restore::hold_source(app, caller, new).await?;
    let lock = app.locks.lock(&new.id).await;
    let place = app.places.take().await?;
    match insert(app, caller, new, idempotent, Begins::Created).await? {
        Inserted::New(vm) => {
            let vm = make(app, vm, program.as_ref(), lock, place).await?;
            app.pool.note(new);
            Ok(Attempt::Made(Box::new(vm)))
        }
        other => {
            drop(place);
            answer_to(app, caller, other).await
        }
    }
}

/// The same with a VM that runs already: all that is left to do is its record.
async fn attempt_with(
    app: &Arc<App>,
    caller: &Caller,
    new: &NewVm,
    idempotent: Option<&Idempotent>,
    claimed: Claimed,
) -> Result<Attempt<Box<Vm>>, AppError> {
    fault::point("after_pool_claim");
    let new = NewVm { id: claimed.id.clone(), ..new.clone() };
    match insert(app, caller, &new, idempotent, Begins::Running).await {
        // What ended meanwhile has waited for the lock, and finds the record.
        Ok(inserted @ Inserted::New(_)) => {
            app.pool.note(&new);
            answer_to(app, caller, inserted).await
        }
        Ok(other) => {
            app.pool.give_back(app, claimed);
            answer_to(app, caller, other).await
        }
        Err(error) => {
            app.pool.give_up(app, claimed);
            Err(error)
        }
    }
}

async fn answer_to(app: &App, caller: &Caller, inserted: Inserted) -> Result<Attempt<Box<Vm>>, AppError> {
    match inserted {
        Inserted::New(vm) => Ok(Attempt::Made(Box::new(vm))),
        Inserted::Replay(vm) => replay(app, caller, vm).await,
        Inserted::KeyReused => Err(AppError::key_reused()),
        Inserted::OverQuota(over) => Err(AppError::OverQuota(over)),
    }
}

async fn insert(
    app: &App,
    caller: &Caller,
    new: &NewVm,
    idempotent: Option<&Idempotent>,
    begins: Begins,
) -> Result<Inserted, AppError> {
    let account = app.store.account_get(&caller.account_id).await?.ok_or(AppError::NotFound("account"))?;
    let idempotency = idempotent.map(Idempotency::from);
    // From here to the record the image's blob can't go. That of a snapshot is the snapshot's, whose share is held.
    let _gate = app.images.gate.read().await;
    if new.snapshot_id.is_none() {
        still_has(app, caller, new).await?;
    }
    let inserted = match begins {
        Begins::Running => app.store.vm_insert_running(new, &account.quota, idempotency).await?,
        Begins::Created => app.store.vm_insert(new, &account.quota, idempotency).await?,
    };
    if let Inserted::New(vm) = &inserted {
        tracing::info!(vm_id = %vm.id, account_id = %vm.account_id, "VM {} created", vm.id);
        fault::point("after_vm_insert");
    }
    Ok(inserted)
}

async fn make(
    app: &App,
    created: Vm,
    program: Option<&Program>,
    _lock: OwnedRwLockWriteGuard<()>,
    _place: Place,
) -> Result<Vm, AppError> {
    if created.is_cached()
        && let Some(program) = program
    {
        let made = service::prepare_new(app, &created, program).await;
        if let Err(failure) = &made {
            settle_failed(app, &created, end_of(failure), failure).await;
        }
        return made;
    }
    let from = program.map_or(From::Snapshot, From::Image);
    let starting = app.store.vm_transition(&created.id, VmState::Created, VmEvent::Start, Default::default()).await?;
    let Some(starting) = starting else { return Err(AppError::NotFound("VM")) };
    fault::point("after_start_intent");
    let failure = match bring_up(app, &starting, from).await {
        Ok(vm) => return Ok(vm),
        Err(failure) => failure,
    };
    settle_failed(app, &starting, end_of(&failure), &failure).await;
    Err(failure)
}

/// What the record says of a VM that didn't come up.
pub(super) fn end_of(failure: &AppError) -> EndReport {
    match failure {
        AppError::Boot(end) => end.clone(),
        AppError::Internal { .. } => report(EndReason::BootFailed, "The host failed while bringing it up."),
        other => report(EndReason::BootFailed, other.to_string()),
    }
}

/// Whether the same request made again finds out by itself, so that its key must not be kept for it.
pub(super) fn frees_key(failure: &AppError) -> bool {
    matches!(failure, AppError::Unavailable { .. } | AppError::Unprocessable { .. })
}

/// Leaves nothing of a VM that didn't come up. What fails here is logged and taken up by the reconciler; the client's
/// answer is why the VM didn't come up.
async fn settle_failed(app: &App, begun: &Vm, end: EndReport, failure: &AppError) {
    let id = &begun.id;
    if frees_key(failure)
        && let Err(error) = app.store.idempotency_forget(id).await
    {
        tracing::warn!(vm_id = %id, error = chain(&error), "the idempotency key of VM {id} stays taken");
    }
    // When the record has moved on, whoever deleted it has destroyed, maybe before the engine had made it all.
    if let Err(error) = mark_deleted(app, begun, Some(end)).await {
        tracing::error!(vm_id = %id, error = error.inside(), "the failure of VM {id} can't be recorded now");
    }
    // Logged where it fails.
    let _ = super::destroy(app, id).await;
}

/// Waits for the request that came first, and answers as it did.
async fn replay(app: &App, caller: &Caller, first: Vm) -> Result<Attempt<Box<Vm>>, AppError> {
    let patience = app.config.vm.start_timeout + app.config.limits.create_wait;
    let settled = async {
        let mut vm = first;
        while matches!(vm.state, VmState::Created | VmState::Starting) {
            tokio::time::sleep(REPLAY_POLL).await;
            let now = app.store.vm_get(&caller.account_id, &vm.id).await?;
            vm = now.ok_or(AppError::NotFound("VM"))?;
        }
        Ok(vm)
    };
    let vm = tokio::time::timeout(patience, settled).await.unwrap_or_else(|_| {
        Err(AppError::Unavailable {
            code: "busy",
            message: "the first request with this Idempotency-Key is still in progress; try again shortly".into(),
        })
    })?;
    match vm.end.clone() {
        Some(end) if vm.started_at.is_none() => Ok(Attempt::FirstFailed(end)),
        _ => Ok(Attempt::Made(Box::new(vm))),
    }
}
