//! `/v1/vms`

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    http::{HeaderMap, StatusCode},
};
use serde::Serialize;
use serde_json::Value;
use tiffin_engine::Denied;
use tiffin_store::Vm;
use tiffin_types::{
    id::{ImageId, SnapshotId, VmId},
    limits,
    network::{EgressPolicy, parse_allow_entry},
    time::Timestamp,
    vm::{EndReport, EngineName, ProvisionMode, VmState},
};
use utoipa::ToSchema;

use super::{
    body::{Fields, JsonObject, text, whole},
    request::Id,
};
use crate::{
    app::{
        App,
        auth::Caller,
        vms::{self, Idempotent, VmRequest},
    },
    error::AppError,
};

/// The address that every guest has in its own network.
const GUEST_IP: &str = "172.16.0.2";
const CREATE_FIELDS: &str = "cpu, memMb, allowIps, outboundInternet, imageId, snapshotId, diskSizeMb, engine are";

/// What to make.
#[derive(ToSchema)]
#[allow(dead_code, reason = "documents what `vm_request` reads")]
#[schema(rename_all = "camelCase")]
pub(crate) struct VmCreate {
    /// vCPUs.
    #[schema(minimum = 1, maximum = 8, example = 1)]
    cpu: u32,
    /// Memory, in MiB.
    #[schema(minimum = 128, maximum = 8192, example = 512)]
    mem_mb: u32,
    /// Networks that may be reached when `outboundInternet` is true, in CIDR notation; an empty list is nothing.
    /// A private or otherwise special network has to be named itself: 0.0.0.0/0 opens the public internet alone.
    #[schema(max_items = 256, example = json!(["0.0.0.0/0"]))]
    allow_ips: Vec<String>,
    /// Whether anything outside may be reached at all.
    #[schema(default = false)]
    outbound_internet: Option<bool>,
    /// What it is made of; the default image when missing.
    #[schema(example = "01JD4W5C1QZX6M0V5K2B8N7T3A")]
    image_id: Option<String>,
    /// The snapshot to go on from, instead of booting. `cpu` and `memMb` must be the snapshot's; `imageId` and
    /// `diskSizeMb` too, where they are given.
    #[schema(example = "snap-0123456789abcd")]
    snapshot_id: Option<String>,
    /// Room for what it writes, in MiB; 1024 or the snapshot's when missing.
    #[schema(minimum = 64, maximum = 512_000)]
    disk_size_mb: Option<u32>,
    /// What runs it, of what this host has. When missing: the snapshot's; for an image with a kernel of its own, one that
    /// boots kernels; else the server's `engine`.
    #[schema(example = "gvisor")]
    engine: Option<String>,
}

/// A VM.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct VmBody {
    #[schema(example = "vm-0123456789abcd")]
    id: String,
    #[schema(value_type = String, example = "RUNNING")]
    state: VmState,
    cpu: u32,
    mem_mb: u32,
    disk_size_mb: u32,
    /// Its address in its own network; the same for every VM.
    #[schema(example = "172.16.0.2")]
    guest_ip: &'static str,
    #[schema(value_type = String, format = DateTime)]
    created_at: Timestamp,
    /// When it last came up.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    started_at: Option<Timestamp>,
    #[schema(value_type = String, example = "boot")]
    provision_mode: ProvisionMode,
    image_id: String,
    outbound_internet: bool,
    allow_ips: Vec<String>,
    /// What runs it.
    #[schema(example = "gvisor")]
    engine: &'static str,
    /// What stands between it and the host.
    #[schema(example = "userspace-kernel")]
    isolation: &'static str,
    /// Why it is in ERROR.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<VmError>,
    /// How its last run ended, when it is STOPPED.
    #[serde(skip_serializing_if = "Option::is_none")]
    end: Option<VmEnd>,
}

/// Why a VM is in ERROR.
#[derive(Serialize, ToSchema)]
pub(crate) struct VmError {
    #[schema(example = "oom")]
    code: &'static str,
    #[schema(example = "It used more memory than its 512 MiB.")]
    message: String,
}

/// How a VM's run ended.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct VmEnd {
    #[schema(example = "requested")]
    reason: &'static str,
    message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    exit_code: Option<i32>,
}

/// What a VM's network has refused.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct VmNetwork {
    /// Whether anything outside may be reached at all.
    outbound_internet: bool,
    /// The networks that may be reached.
    allow_ips: Vec<String>,
    #[schema(value_type = DeniedBody)]
    denied: Denied,
}

/// Packets that were refused in the VM's present run.
#[derive(ToSchema)]
#[allow(dead_code, reason = "documents the engine's type")]
pub(crate) struct DeniedBody {
    /// All of them.
    total: u64,
    /// By destination, first seen first; at most 256.
    destinations: Vec<DeniedDestination>,
}

/// A destination that was refused.
#[derive(ToSchema)]
#[allow(dead_code, reason = "documents the engine's type")]
pub(crate) struct DeniedDestination {
    #[schema(example = "192.0.2.7")]
    address: String,
    #[schema(example = "tcp")]
    protocol: String,
    port: Option<u16>,
    count: u64,
}

impl From<Vm> for VmBody {
    fn from(vm: Vm) -> Self {
        let (error, end) = match (vm.state, vm.end) {
            (VmState::Error, Some(end)) => (Some(VmError { code: end.reason.as_str(), message: end.message }), None),
            (VmState::Stopped, Some(EndReport { reason, message, exit_code })) => {
                (None, Some(VmEnd { reason: reason.as_str(), message, exit_code }))
            }
            _ => (None, None),
        };
        Self {
            id: vm.id.to_string(),
            state: vm.state,
            cpu: vm.size.cpus,
            mem_mb: vm.size.mem_mb,
            disk_size_mb: vm.size.disk_mb,
            guest_ip: GUEST_IP,
            created_at: vm.created_at,
            started_at: vm.started_at,
            provision_mode: vm.provision_mode,
            image_id: vm.image_id.to_string(),
            outbound_internet: vm.egress.outbound_internet,
            allow_ips: vm.egress.allow.iter().map(ToString::to_string).collect(),
            engine: vm.engine.as_str(),
            isolation: vm.isolation.as_str(),
            error,
            end,
        }
    }
}

/// Create a VM
///
/// Answers when the VM is RUNNING. When it doesn't come up, nothing is left of it and the error says why.
#[utoipa::path(post, path = "/v1/vms", operation_id = "vm_create", tag = "VMs", request_body = VmCreate,
    params(("Idempotency-Key" = Option<String>, Header, description =
        "1 to 255 visible ASCII characters. The same key with the same body gives the same VM for 24 hours; with another body 422.")),
    responses((status = 201, description = "The VM runs", body = VmBody), (status = 404), (status = 422), (status = 429), (status = 503)))]
pub(crate) async fn vm_create(
    caller: Caller,
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    body: JsonObject,
) -> Result<(StatusCode, Json<VmBody>), AppError> {
    let idempotent = idempotency_key(&headers)?.map(|key| Idempotent { key, request_sha256: body.sha256() });
    let request = vm_request(body.fields())?;
    let vm = vms::vm_create(&app, &caller, request, idempotent).await?;
    Ok((StatusCode::CREATED, Json(vm.into())))
}

/// List the account's VMs
#[utoipa::path(get, path = "/v1/vms", operation_id = "vm_list", tag = "VMs",
    responses((status = 200, description = "VMs that are not deleted, oldest first", body = Vec<VmBody>)))]
pub(crate) async fn vm_list(caller: Caller, State(app): State<Arc<App>>) -> Result<Json<Vec<VmBody>>, AppError> {
    let list = vms::vm_list(&app, &caller).await?;
    Ok(Json(list.into_iter().map(VmBody::from).collect()))
}

/// Get a VM
#[utoipa::path(get, path = "/v1/vms/{id}", operation_id = "vm_get", tag = "VMs", params(("id" = String, Path)),
    responses((status = 200, description = "The VM", body = VmBody)))]
pub(crate) async fn vm_get(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(id): Id<VmId>,
) -> Result<Json<VmBody>, AppError> {
    Ok(Json(vms::vm_get(&app, &caller, &id).await?.into()))
}

/// Delete a VM
///
/// Works in every state, also while it starts. Its disk is gone afterwards.
#[utoipa::path(delete, path = "/v1/vms/{id}", operation_id = "vm_delete", tag = "VMs", params(("id" = String, Path)),
    responses((status = 204, description = "Deleted")))]
pub(crate) async fn vm_delete(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(id): Id<VmId>,
) -> Result<StatusCode, AppError> {
    vms::vm_delete(&app, &caller, &id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Start a VM that is down
#[utoipa::path(post, path = "/v1/vms/{id}/start", operation_id = "vm_start", tag = "VMs", params(("id" = String, Path)),
    responses((status = 204, description = "It is RUNNING"), (status = 409), (status = 422), (status = 429), (status = 503)))]
pub(crate) async fn vm_start(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(id): Id<VmId>,
) -> Result<StatusCode, AppError> {
    vms::vm_start(&app, &caller, &id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Shut a VM down
///
/// Its processes are asked to end and killed after a grace. Its disk stays.
#[utoipa::path(post, path = "/v1/vms/{id}/stop", operation_id = "vm_stop", tag = "VMs", params(("id" = String, Path)),
    responses((status = 204, description = "It is STOPPED"), (status = 409)))]
pub(crate) async fn vm_stop(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(id): Id<VmId>,
) -> Result<StatusCode, AppError> {
    vms::vm_stop(&app, &caller, &id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Freeze a running VM
#[utoipa::path(post, path = "/v1/vms/{id}/pause", operation_id = "vm_pause", tag = "VMs", params(("id" = String, Path)),
    responses((status = 204, description = "It is PAUSED"), (status = 409), (status = 422)))]
pub(crate) async fn vm_pause(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(id): Id<VmId>,
) -> Result<StatusCode, AppError> {
    vms::vm_pause(&app, &caller, &id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Let a paused VM go on
#[utoipa::path(post, path = "/v1/vms/{id}/resume", operation_id = "vm_resume", tag = "VMs", params(("id" = String, Path)),
    responses((status = 204, description = "It is RUNNING"), (status = 409), (status = 422)))]
pub(crate) async fn vm_resume(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(id): Id<VmId>,
) -> Result<StatusCode, AppError> {
    vms::vm_resume(&app, &caller, &id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// See what a VM's network has refused
#[utoipa::path(get, path = "/v1/vms/{id}/network", operation_id = "vm_network_get", tag = "VMs", params(("id" = String, Path)),
    responses((status = 200, description = "Its policy, and what was refused in its present run", body = VmNetwork)))]
pub(crate) async fn vm_network_get(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(id): Id<VmId>,
) -> Result<Json<VmNetwork>, AppError> {
    let (vm, denied) = vms::vm_network(&app, &caller, &id).await?;
    let body = VmBody::from(vm);
    Ok(Json(VmNetwork { outbound_internet: body.outbound_internet, allow_ips: body.allow_ips, denied }))
}

/// The header `Idempotency-Key`, if it is there and well formed.
pub(super) fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, AppError> {
    let Some(value) = headers.get("idempotency-key") else { return Ok(None) };
    let key = value.to_str().unwrap_or("");
    if limits::IDEMPOTENCY_KEY_CHARS.contains(&key.len()) && key.bytes().all(|b| b.is_ascii_graphic()) {
        return Ok(Some(key.to_owned()));
    }
    Err(AppError::field("Idempotency-Key", "must be 1 to 255 visible ASCII characters"))
}

fn vm_request(mut fields: Fields) -> Result<VmRequest, AppError> {
    let number = |range: &std::ops::RangeInclusive<u32>| {
        format!("must be a whole number from {} to {}", range.start(), range.end())
    };
    let cpus = fields.required("cpu", &number(&limits::CPU), whole(limits::CPU));
    let mem_mb = fields.required("memMb", &number(&limits::MEM_MB), whole(limits::MEM_MB));
    let allow = allow_ips(&mut fields);
    let outbound_internet =
        fields.optional("outboundInternet", false, "must be true or false", |value| value.as_bool());
    let image_id = fields.optional("imageId", None, "must be an image's id, a text of 26 characters", |value| {
        text(value)?.parse::<ImageId>().ok().map(Some)
    });
    let disk_mb =
        fields.optional("diskSizeMb", None, &number(&limits::DISK_MB), |value| whole(limits::DISK_MB)(value).map(Some));
    let snapshot_id =
        fields.optional("snapshotId", None, "must be a snapshot's id, such as snap-0123456789abcd", |value| {
            text(value)?.parse::<SnapshotId>().ok().map(Some)
        });
    let engine = fields
        .optional("engine", None, "must be gvisor or qemu", |value| text(value)?.parse::<EngineName>().ok().map(Some));
    let request = (|| {
        Some(VmRequest {
            cpus: cpus?,
            mem_mb: mem_mb?,
            disk_mb: disk_mb?,
            egress: EgressPolicy { outbound_internet: outbound_internet?, allow: allow? },
            engine: engine?,
            image_id: image_id?,
            snapshot_id: snapshot_id?,
            service: None,
        })
    })();
    fields.finish_with(request, CREATE_FIELDS)
}

/// The field `allowIps`, which must be there.
pub(super) fn allow_ips(fields: &mut Fields) -> Option<Vec<ipnet::IpNet>> {
    let expected = format!("must be a list of at most {} networks in CIDR notation", limits::ALLOW_IPS_MAX);
    let entries = fields.required("allowIps", &expected, |value| match value {
        Value::Array(entries) if entries.len() <= limits::ALLOW_IPS_MAX => Some(entries),
        _ => None,
    })?;
    let mut networks = Vec::new();
    for (at, entry) in entries.into_iter().enumerate() {
        match parse_allow_entry(&text(entry).unwrap_or_default()) {
            Ok(network) => networks.push(network),
            Err(error) => fields.wrong(format!("allowIps[{at}]"), error.to_string()),
        }
    }
    Some(networks)
}
