//! VMs that run their image's program, as the second dialect has them: one-time VMs and cached ones. How they come up and
//! end is in [`super::vms`]; that cached ones are booted ahead is in [`super::prepared`].

use std::{collections::BTreeMap, sync::Arc};

use serde_json::json;
use tiffin_store::{Vm, VmCursor, VmFilter};
use tiffin_types::{
    account::Scope,
    id::{ImageId, VmId},
    network::EgressPolicy,
    vm::{Lifetime, Service, VmState},
};

use super::{
    App,
    auth::Caller,
    vms::{Idempotent, VmRequest, vm_create, vm_delete, vm_start, vm_stop},
};
use crate::error::AppError;

/// MiB in a GB of a volume.
const GB_IN_MIB: u32 = 1024;

/// A VM to be made that runs its image's program; its fields are within their ranges.
pub(crate) struct ServiceRequest {
    pub(crate) image_id: ImageId,
    pub(crate) cpus: u32,
    pub(crate) mem_mb: u32,
    /// Beyond the image's; secret.
    pub(crate) env: BTreeMap<String, String>,
    pub(crate) service: Service,
}

/// Makes such a VM; answers when its program runs or, of a cached one, when it is prepared.
pub(crate) async fn service_create(
    app: &Arc<App>,
    caller: &Caller,
    request: ServiceRequest,
    idempotent: Option<Idempotent>,
) -> Result<Vm, AppError> {
    caller.require(Scope::Write)?;
    let request = VmRequest {
        cpus: request.cpus,
        mem_mb: request.mem_mb,
        disk_mb: request.service.volume_gb.map(|gb| gb.saturating_mul(GB_IN_MIB)),
        egress: egress(app),
        engine: None,
        image_id: Some(request.image_id),
        snapshot_id: None,
        service: Some((request.service, request.env)),
    };
    vm_create(app, caller, request, idempotent).await
}

/// This dialect can't say what a VM may reach outside: what the configuration says.
fn egress(app: &App) -> EgressPolicy {
    match app.config.services.outbound_internet {
        true => EgressPolicy {
            outbound_internet: true,
            allow: vec![ipnet::Ipv4Net::default().into(), ipnet::Ipv6Net::default().into()],
        },
        false => EgressPolicy::default(),
    }
}

/// One of the caller's VMs, also a deleted one.
pub(crate) async fn service_get(app: &App, caller: &Caller, id: &VmId) -> Result<Vm, AppError> {
    caller.require(Scope::Read)?;
    app.store.vm_get(&caller.account_id, id).await?.ok_or(AppError::NotFound("VM"))
}

/// At most `limit` of the caller's VMs, newest first.
pub(crate) async fn service_page(
    app: &App,
    caller: &Caller,
    filter: &VmFilter,
    after: Option<&VmCursor>,
    limit: u32,
) -> Result<Vec<Vm>, AppError> {
    caller.require(Scope::Read)?;
    Ok(app.store.vm_page(&caller.account_id, filter, after, limit).await?)
}

/// Stops a one-time VM, which destroys it.
pub(crate) async fn one_time_stop(app: &Arc<App>, caller: &Caller, id: &VmId) -> Result<(), AppError> {
    caller.require(Scope::Write)?;
    let vm = undestroyed(app, caller, id).await?;
    is_for(&vm, Lifetime::OneTime)?;
    match vm.state {
        VmState::Running | VmState::Paused => match vm_stop(app, caller, id).await {
            // It has just ended by itself, and is gone.
            Err(AppError::NotFound(_)) => Ok(()),
            stopped => stopped,
        },
        VmState::Created
        | VmState::Starting
        | VmState::Stopping
        | VmState::Stopped
        | VmState::Error
        | VmState::Deleted => vm_delete(app, caller, id).await,
    }
}

/// Destroys a VM that runs its image's program.
pub(crate) async fn service_destroy(app: &Arc<App>, caller: &Caller, id: &VmId) -> Result<(), AppError> {
    caller.require(Scope::Write)?;
    let vm = undestroyed(app, caller, id).await?;
    if vm.service.is_none() {
        return Err(not_of(&vm));
    }
    vm_delete(app, caller, id).await
}

/// Starts a cached VM.
pub(crate) async fn cached_start(app: &Arc<App>, caller: &Caller, id: &VmId) -> Result<(), AppError> {
    caller.require(Scope::Write)?;
    is_for(&undestroyed(app, caller, id).await?, Lifetime::Cached)?;
    vm_start(app, caller, id).await
}

/// Stops a cached VM.
pub(crate) async fn cached_stop(app: &Arc<App>, caller: &Caller, id: &VmId) -> Result<(), AppError> {
    caller.require(Scope::Write)?;
    is_for(&undestroyed(app, caller, id).await?, Lifetime::Cached)?;
    vm_stop(app, caller, id).await
}

/// The name by which a VM's program is reached.
pub(crate) fn hostname(app: &App, vm: &Vm) -> String {
    // Records of old versions have none.
    vm.host_label.as_ref().map(|label| app.routes.hostname(label)).unwrap_or_default()
}

async fn undestroyed(app: &App, caller: &Caller, id: &VmId) -> Result<Vm, AppError> {
    let vm = service_get(app, caller, id).await?;
    match vm.state {
        VmState::Deleted => Err(AppError::Conflict {
            code: "wrong_state",
            message: "the VM is destroyed".into(),
            details: json!({ "state": vm.state }),
        }),
        _ => Ok(vm),
    }
}

/// Refuses a VM of another lifetime than the operation is for.
fn is_for(vm: &Vm, lifetime: Lifetime) -> Result<(), AppError> {
    let message = match vm.service.map(|service| service.lifetime) {
        Some(its) if its == lifetime => return Ok(()),
        Some(Lifetime::Cached) => "the VM is a cached one: use /v1/vm/cached/{id}/start, /stop and /destroy",
        Some(Lifetime::OneTime) => "the VM is for one run: it can be stopped by /v1/vm/{id}/stop alone",
        None => return Err(not_of(vm)),
    };
    Err(AppError::Conflict { code: "wrong_kind", message: message.into(), details: json!({ "state": vm.state }) })
}

fn not_of(vm: &Vm) -> AppError {
    AppError::Conflict {
        code: "wrong_kind",
        message: "the VM was made by POST /v1/vms: start, stop and delete it there".into(),
        details: json!({ "state": vm.state }),
    }
}
