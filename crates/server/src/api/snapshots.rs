//! `/v1/snapshots`, and what makes VMs of a VM.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    http::{HeaderMap, StatusCode},
};
use serde::Serialize;
use sha2::{Digest, Sha256};
use tiffin_store::Snapshot;
use tiffin_types::{
    id::{SnapshotId, VmId},
    limits,
    network::EgressPolicy,
    snapshot::SnapshotState,
    time::Timestamp,
};
use utoipa::ToSchema;

use super::{
    body::{Fields, JsonObject, NAME, OptionalJsonObject, name, whole},
    request::Id,
    timing::{ServerTiming, server_timing},
    vms::{VmBody, allow_ips, idempotency_key},
};
use crate::{
    app::{
        App,
        auth::Caller,
        snapshots,
        vms::{
            Idempotent,
            fork::{self, ForkRequest},
        },
    },
    error::AppError,
};

/// How to save.
#[derive(ToSchema)]
#[allow(dead_code, reason = "documents what `snapshot_create` reads")]
pub(crate) struct SnapshotCreate {
    /// A name for people; need not be unique.
    #[schema(min_length = 1, max_length = 100, example = "after setup")]
    name: Option<String>,
}

/// What to make of a VM.
#[derive(ToSchema)]
#[allow(dead_code, reason = "documents what `fork_request` reads")]
#[schema(rename_all = "camelCase")]
pub(crate) struct VmFork {
    /// How many clones.
    #[schema(minimum = 1, maximum = 16, example = 2)]
    count: u32,
    /// Networks that each clone may reach when `outboundInternet` is true; the source's when both are missing.
    #[schema(max_items = 256)]
    allow_ips: Option<Vec<String>>,
    /// Whether the clones may reach anything outside; the source's when both are missing.
    outbound_internet: Option<bool>,
}

/// A VM's memory, CPU state and disk at a moment.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct SnapshotBody {
    #[schema(example = "snap-0123456789abcd")]
    id: String,
    /// The VM that was saved; it may be gone.
    #[schema(example = "vm-0123456789abcd")]
    vm_id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    /// READY, or LOST when its files are not on the host.
    #[schema(value_type = String, example = "READY")]
    state: SnapshotState,
    #[schema(value_type = String, format = DateTime)]
    created_at: Timestamp,
    cpu: u32,
    mem_mb: u32,
    disk_size_mb: u32,
    image_id: String,
    /// What it takes on the host's disk.
    size_bytes: u64,
}

impl From<Snapshot> for SnapshotBody {
    fn from(snapshot: Snapshot) -> Self {
        Self {
            id: snapshot.id.to_string(),
            vm_id: snapshot.vm_id.to_string(),
            name: snapshot.name,
            state: snapshot.state,
            created_at: snapshot.created_at,
            cpu: snapshot.size.cpus,
            mem_mb: snapshot.size.mem_mb,
            disk_size_mb: snapshot.size.disk_mb,
            image_id: snapshot.image_id.to_string(),
            size_bytes: snapshot.size_bytes,
        }
    }
}

/// Save a running VM
///
/// Its memory, CPU state and disk. It stands still for a moment, which the answer's `Server-Timing` header tells
/// (`pause`, in milliseconds), and runs on. The body may be missing.
#[utoipa::path(post, path = "/v1/vms/{id}/snapshots", operation_id = "snapshot_create", tag = "Snapshots",
    params(("id" = String, Path)), request_body = SnapshotCreate,
    responses((status = 201, description = "Saved", body = SnapshotBody), (status = 409), (status = 422), (status = 429), (status = 503)))]
pub(crate) async fn snapshot_create(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(id): Id<VmId>,
    OptionalJsonObject(body): OptionalJsonObject,
) -> Result<(StatusCode, ServerTiming, Json<SnapshotBody>), AppError> {
    let mut fields = body.fields();
    let name = fields.optional("name", None, NAME, |value| name(value).map(Some));
    let name = fields.finish_with(name, "name is")?;
    let taken = snapshots::snapshot_create(&app, &caller, &id, name).await?;
    Ok((StatusCode::CREATED, server_timing("pause", taken.paused), Json(taken.snapshot.into())))
}

/// List the account's snapshots
#[utoipa::path(get, path = "/v1/snapshots", operation_id = "snapshot_list", tag = "Snapshots",
    responses((status = 200, description = "The account's snapshots, oldest first", body = Vec<SnapshotBody>)))]
pub(crate) async fn snapshot_list(
    caller: Caller,
    State(app): State<Arc<App>>,
) -> Result<Json<Vec<SnapshotBody>>, AppError> {
    let list = snapshots::snapshot_list(&app, &caller).await?;
    Ok(Json(list.into_iter().map(SnapshotBody::from).collect()))
}

/// Get a snapshot
#[utoipa::path(get, path = "/v1/snapshots/{id}", operation_id = "snapshot_get", tag = "Snapshots",
    params(("id" = String, Path)), responses((status = 200, description = "The snapshot", body = SnapshotBody)))]
pub(crate) async fn snapshot_get(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(id): Id<SnapshotId>,
) -> Result<Json<SnapshotBody>, AppError> {
    Ok(Json(snapshots::snapshot_get(&app, &caller, &id).await?.into()))
}

/// Delete a snapshot
///
/// VMs that were made of it live on.
#[utoipa::path(delete, path = "/v1/snapshots/{id}", operation_id = "snapshot_delete", tag = "Snapshots",
    params(("id" = String, Path)), responses((status = 204, description = "Deleted")))]
pub(crate) async fn snapshot_delete(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(id): Id<SnapshotId>,
) -> Result<StatusCode, AppError> {
    snapshots::snapshot_delete(&app, &caller, &id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Fork a running VM
///
/// Makes clones that go on where it is now, each with an identity of its own, and answers when all of them run. When one
/// doesn't come up, none is left. The source runs on.
#[utoipa::path(post, path = "/v1/vms/{id}/fork", operation_id = "vm_fork", tag = "VMs", request_body = VmFork,
    params(("id" = String, Path), ("Idempotency-Key" = Option<String>, Header, description =
        "1 to 255 visible ASCII characters. The same key with the same body gives the same clones for 24 hours; with another body 422.")),
    responses((status = 201, description = "The clones run", body = Vec<VmBody>), (status = 409), (status = 422), (status = 429), (status = 503)))]
pub(crate) async fn vm_fork(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(id): Id<VmId>,
    headers: HeaderMap,
    body: JsonObject,
) -> Result<(StatusCode, Json<Vec<VmBody>>), AppError> {
    // A key that was used for another source, or for a create, is another request's.
    let request_sha256 = Sha256::new().chain_update(b"fork\0").chain_update(id.as_str()).chain_update(body.sha256());
    let request_sha256 = request_sha256.finalize().into();
    let idempotent = idempotency_key(&headers)?.map(|key| Idempotent { key, request_sha256 });
    let request = fork_request(body.fields())?;
    let clones = fork::vm_fork(&app, &caller, &id, request, idempotent).await?;
    Ok((StatusCode::CREATED, Json(clones.into_iter().map(VmBody::from).collect())))
}

fn fork_request(mut fields: Fields) -> Result<ForkRequest, AppError> {
    let (least, most) = (limits::FORK_COUNT.start(), limits::FORK_COUNT.end());
    let range = format!("must be a whole number from {least} to {most}");
    let count = fields.required("count", &range, whole(limits::FORK_COUNT));
    let (allows, opens) = (fields.has("allowIps"), fields.has("outboundInternet"));
    let egress = match allows || opens {
        false => Some(None),
        true => {
            // Half a policy would be joined with the half of another VM's.
            let allow = allow_ips(&mut fields);
            let outbound_internet =
                fields.required("outboundInternet", "must be true or false, when allowIps is given", |value| {
                    value.as_bool()
                });
            (|| Some(Some(EgressPolicy { outbound_internet: outbound_internet?, allow: allow? })))()
        }
    };
    let request = (|| Some(ForkRequest { count: count?, egress: egress? }))();
    fields.finish_with(request, "count, allowIps, outboundInternet are")
}
