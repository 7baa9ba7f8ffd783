//! Making a VM of a snapshot: what a request for one must agree with, and that the snapshot stays while it is used.

use tiffin_engine::Kind;
use tiffin_store::{NewSnapshot, NewVm, Snapshot};
use tiffin_types::{
    id::{SnapshotId, VmId},
    network::EgressPolicy,
    vm::ProvisionMode,
};
use tokio::sync::OwnedRwLockReadGuard;

use super::{App, Caller, VmRequest};
use crate::{
    app::snapshots::{can_snapshot, find},
    error::{AppError, FieldError},
};

/// The record of a VM that is made of a snapshot, if the request agrees with what was saved.
pub(super) async fn new_vm(
    app: &App,
    caller: &Caller,
    id: &SnapshotId,
    request: &VmRequest,
) -> Result<NewVm, AppError> {
    let snapshot = find(app, caller, id).await?;
    agree(&snapshot, request)?;
    let kind = can_snapshot(app, snapshot.engine)?;
    Ok(NewVm {
        id: VmId::random(),
        account_id: snapshot.account_id,
        image_id: snapshot.image_id,
        image_digest: snapshot.image_digest,
        kernel_digest: snapshot.kernel_digest,
        engine: kind.name,
        isolation: kind.isolation,
        size: snapshot.size,
        egress: request.egress.clone(),
        provision_mode: ProvisionMode::Snapshot,
        snapshot_id: Some(snapshot.id),
        service: None,
    })
}

/// The record of a VM of that kind and of a snapshot that is to be, with a network of its own.
pub(super) fn of_saved(kind: Kind, snapshot: &NewSnapshot, egress: EgressPolicy) -> NewVm {
    NewVm {
        id: VmId::random(),
        account_id: snapshot.account_id.clone(),
        image_id: snapshot.image_id.clone(),
        image_digest: snapshot.image_digest.clone(),
        kernel_digest: snapshot.kernel_digest.clone(),
        engine: kind.name,
        isolation: kind.isolation,
        size: snapshot.size,
        egress,
        provision_mode: ProvisionMode::Snapshot,
        snapshot_id: Some(snapshot.id.clone()),
        service: None,
    }
}

/// A share of the lock of the snapshot that the VM is made of, when it is there; nothing for a VM that boots.
pub(super) async fn hold_source(
    app: &App,
    caller: &Caller,
    new: &NewVm,
) -> Result<Option<OwnedRwLockReadGuard<()>>, AppError> {
    let Some(id) = &new.snapshot_id else { return Ok(None) };
    let share = app.snapshot_locks.share(id).await;
    find(app, caller, id).await?;
    Ok(Some(share))
}

/// Memory and CPU state fit a machine of the same size only, and the disk is the one that was saved.
fn agree(snapshot: &Snapshot, request: &VmRequest) -> Result<(), AppError> {
    let mut wrong = Vec::new();
    let mut compare = |field: &str, asked: String, saved: String, hint: &str| {
        if asked != saved {
            let message = format!("is {asked}, and the snapshot's is {saved}: {hint}");
            wrong.push(FieldError { field: field.into(), message });
        }
    };
    let same = "a VM that is restored has the size of the one that was saved";
    compare("cpu", request.cpus.to_string(), snapshot.size.cpus.to_string(), same);
    compare("memMb", request.mem_mb.to_string(), snapshot.size.mem_mb.to_string(), same);
    if let Some(disk_mb) = request.disk_mb {
        let disk = "its disk is in the snapshot and can't be resized; leave the field out";
        compare("diskSizeMb", disk_mb.to_string(), snapshot.size.disk_mb.to_string(), disk);
    }
    if let Some(engine) = request.engine {
        let hint = "what was saved by one engine can't go on under another; leave the field out";
        compare("engine", engine.as_str().to_owned(), snapshot.engine.as_str().to_owned(), hint);
    }
    if let Some(image) = &request.image_id {
        let hint = "leave the field out, as the snapshot names its image";
        compare("imageId", image.to_string(), snapshot.image_id.to_string(), hint);
    }
    if wrong.is_empty() { Ok(()) } else { Err(AppError::Fields(wrong)) }
}
