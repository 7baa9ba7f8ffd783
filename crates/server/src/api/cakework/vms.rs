//! `/v1/vm/...` and `/vms`: VMs that run their image's program, for one run or cached.

use std::{collections::BTreeMap, sync::Arc};

use axum::{Json, extract::State, http::HeaderMap};
use serde::Serialize;
use serde_json::Value;
use tiffin_store::{Vm, VmCursor, VmFilter};
use tiffin_types::{
    id::{ImageId, VmId},
    limits,
    time::Timestamp,
    vm::{EndReport, Lifetime, Service, VmState},
};
use utoipa::ToSchema;

use super::Nothing;
use crate::{
    api::{
        body::{Fields, JsonObject, text, whole},
        request::{Id, Noun, Parameters},
        vms::idempotency_key,
    },
    app::{
        App,
        auth::Caller,
        services::{self, ServiceRequest},
        vms::Idempotent,
    },
    error::AppError,
};

/// VMs of a page.
const PAGE: u32 = 100;

/// What to run.
#[derive(ToSchema)]
#[allow(dead_code, reason = "documents what `request` reads")]
#[schema(rename_all = "camelCase")]
pub(crate) struct CakeworkVmStart {
    /// The image whose program it runs.
    #[schema(example = "01JD4W5C1QZX6M0V5K2B8N7T3A")]
    image_id: String,
    /// vCPUs.
    #[schema(minimum = 1, maximum = 8, default = 1)]
    cpu: Option<u32>,
    /// Memory, in MB.
    #[schema(minimum = 256, maximum = 16384, default = 256)]
    memory: Option<u32>,
    /// The port that the program listens on, to be reached at `https://{hostname}/`.
    #[schema(minimum = 1, maximum = 65535, example = 8080)]
    port: Option<u16>,
    /// Environment beyond the image's. Never shown again.
    #[schema(value_type = Option<Object>)]
    env_vars: Option<BTreeMap<String, String>>,
    /// Room for what it writes, in GB.
    #[schema(minimum = 1, maximum = 500, rename = "volumeGB")]
    volume_gb: Option<u32>,
}

/// A VM.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct CakeworkVm {
    #[schema(example = "0123456789abcd")]
    id: String,
    #[schema(example = "01jd4w5c1qzx6m0v5k2b8n7t3a.vm.localhost")]
    hostname: String,
    cpu: u32,
    memory: u32,
    image_id: String,
    /// `created`, `started`, `stopped` or `destroyed`.
    #[schema(example = "started")]
    state: &'static str,
    #[schema(value_type = String, format = DateTime)]
    created_at: Timestamp,
    #[schema(value_type = String, format = DateTime)]
    updated_at: Timestamp,
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<u16>,
    #[serde(rename = "volumeGB", skip_serializing_if = "Option::is_none")]
    volume_gb: Option<u32>,
    /// How its last run ended, unless it runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    end: Option<CakeworkEnd>,
}

/// How a run ended.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct CakeworkEnd {
    #[schema(example = "exited")]
    reason: &'static str,
    message: String,
    /// The program's exit code, or 128 + the number of the signal that ended it.
    #[serde(skip_serializing_if = "Option::is_none")]
    exit_code: Option<i32>,
}

/// VMs, newest first.
#[derive(Serialize, ToSchema)]
pub(crate) struct CakeworkVmPage {
    vms: Vec<CakeworkVm>,
    /// With it the next request goes on from here; missing on the last page.
    #[serde(skip_serializing_if = "Option::is_none")]
    pagination: Option<String>,
}

/// A VM's id in this dialect: 14 hexadecimal digits. The other dialect's form is taken, too.
pub(crate) struct ServiceId(pub(crate) VmId);

impl std::str::FromStr for ServiceId {
    type Err = tiffin_types::id::IdError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().or_else(|_| format!("vm-{text}").parse()).map(Self)
    }
}

impl Noun for ServiceId {
    const NOUN: &'static str = "VM";
}

/// Run an image's program in a VM of its own, once
///
/// Answers when the program runs. Its end, or a stop, destroys the VM; its record and logs stay.
#[utoipa::path(post, path = "/v1/vm/start", operation_id = "cakework_vm_start", tag = "Programs", request_body = CakeworkVmStart,
    params(("Idempotency-Key" = Option<String>, Header, description = "As for `POST /v1/vms`")),
    responses((status = 200, description = "The program runs", body = CakeworkVm), (status = 422), (status = 429), (status = 503)))]
pub(crate) async fn cakework_vm_start(
    caller: Caller,
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    body: JsonObject,
) -> Result<Json<CakeworkVm>, AppError> {
    create(&app, &caller, &headers, body, Lifetime::OneTime).await
}

/// Prepare a VM that runs an image's program, to be started fast and often
///
/// All that can be done before a start is done; nothing of the program runs.
#[utoipa::path(post, path = "/v1/vm/cache", operation_id = "cakework_vm_cache", tag = "Programs", request_body = CakeworkVmStart,
    params(("Idempotency-Key" = Option<String>, Header, description = "As for `POST /v1/vms`")),
    responses((status = 200, description = "It can be started. `diskSize` is taken for `volumeGB`, too", body = CakeworkVm),
        (status = 422), (status = 429), (status = 503)))]
pub(crate) async fn cakework_vm_cache(
    caller: Caller,
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    body: JsonObject,
) -> Result<Json<CakeworkVm>, AppError> {
    create(&app, &caller, &headers, body, Lifetime::Cached).await
}

async fn create(
    app: &Arc<App>,
    caller: &Caller,
    headers: &HeaderMap,
    body: JsonObject,
    lifetime: Lifetime,
) -> Result<Json<CakeworkVm>, AppError> {
    let idempotent = idempotency_key(headers)?.map(|key| Idempotent { key, request_sha256: body.sha256() });
    let request = request(body.fields(), lifetime)?;
    let vm = services::service_create(app, caller, request, idempotent).await?;
    Ok(Json(shown(app, vm)))
}

/// Get a VM, also one that is destroyed
#[utoipa::path(method(get, post), path = "/v1/vm/{id}", operation_id = "cakework_vm_get", tag = "Programs",
    params(("id" = String, Path)), responses((status = 200, description = "The VM", body = CakeworkVm)))]
pub(crate) async fn cakework_vm_get(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(ServiceId(id)): Id<ServiceId>,
) -> Result<Json<CakeworkVm>, AppError> {
    let vm = services::service_get(&app, &caller, &id).await?;
    Ok(Json(shown(&app, vm)))
}

/// Stop a VM that runs its program once, and destroy it
#[utoipa::path(post, path = "/v1/vm/{id}/stop", operation_id = "cakework_vm_stop", tag = "Programs",
    params(("id" = String, Path)), responses((status = 200, description = "It is destroyed", body = Nothing), (status = 409)))]
pub(crate) async fn cakework_vm_stop(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(ServiceId(id)): Id<ServiceId>,
) -> Result<Json<Nothing>, AppError> {
    services::one_time_stop(&app, &caller, &id).await?;
    Ok(Json(Nothing {}))
}

/// Destroy a VM
#[utoipa::path(post, path = "/v1/vm/{id}/destroy", operation_id = "cakework_vm_destroy", tag = "Programs",
    params(("id" = String, Path)), responses((status = 200, description = "It is destroyed", body = Nothing), (status = 409)))]
pub(crate) async fn cakework_vm_destroy(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(ServiceId(id)): Id<ServiceId>,
) -> Result<Json<Nothing>, AppError> {
    services::service_destroy(&app, &caller, &id).await?;
    Ok(Json(Nothing {}))
}

/// List the account's VMs
///
/// Newest first, 100 a page; without `status` those that aren't destroyed.
#[utoipa::path(get, path = "/vms", operation_id = "cakework_vm_list", tag = "Programs",
    params(("imageId" = Option<String>, Query), ("status" = Option<String>, Query, description = "`created`, `started`, `stopped` or `destroyed`"),
        ("pagination" = Option<String>, Query, description = "From the page before")),
    responses((status = 200, description = "A page of VMs", body = CakeworkVmPage)))]
pub(crate) async fn cakework_vm_list(
    caller: Caller,
    State(app): State<Arc<App>>,
    params: Parameters,
) -> Result<Json<CakeworkVmPage>, AppError> {
    list(&app, &caller, params).await
}

/// List the account's VMs
#[utoipa::path(get, path = "/v1/vms", operation_id = "cakework_vm_v1_list", tag = "Programs",
    params(("imageId" = Option<String>, Query), ("status" = Option<String>, Query, description = "`created`, `started`, `stopped` or `destroyed`"),
        ("pagination" = Option<String>, Query, description = "From the page before")),
    responses((status = 200, description = "A page of VMs", body = CakeworkVmPage)))]
pub(crate) async fn cakework_vm_v1_list(
    caller: Caller,
    State(app): State<Arc<App>>,
    params: Parameters,
) -> Result<Json<CakeworkVmPage>, AppError> {
    list(&app, &caller, params).await
}

/// Start a cached VM
#[utoipa::path(post, path = "/v1/vm/cached/{id}/start", operation_id = "cakework_cached_start", tag = "Programs",
    params(("id" = String, Path)),
    responses((status = 200, description = "Its program runs", body = Nothing), (status = 409), (status = 422), (status = 429), (status = 503)))]
pub(crate) async fn cakework_cached_start(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(ServiceId(id)): Id<ServiceId>,
) -> Result<Json<Nothing>, AppError> {
    services::cached_start(&app, &caller, &id).await?;
    Ok(Json(Nothing {}))
}

/// Stop a cached VM; its disk stays
#[utoipa::path(post, path = "/v1/vm/cached/{id}/stop", operation_id = "cakework_cached_stop", tag = "Programs",
    params(("id" = String, Path)), responses((status = 200, description = "It is stopped", body = Nothing), (status = 409)))]
pub(crate) async fn cakework_cached_stop(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(ServiceId(id)): Id<ServiceId>,
) -> Result<Json<Nothing>, AppError> {
    services::cached_stop(&app, &caller, &id).await?;
    Ok(Json(Nothing {}))
}

/// Destroy a cached VM
#[utoipa::path(post, path = "/v1/vm/cached/{id}/destroy", operation_id = "cakework_cached_destroy", tag = "Programs",
    params(("id" = String, Path)), responses((status = 200, description = "It is destroyed", body = Nothing), (status = 409)))]
pub(crate) async fn cakework_cached_destroy(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(ServiceId(id)): Id<ServiceId>,
) -> Result<Json<Nothing>, AppError> {
    services::service_destroy(&app, &caller, &id).await?;
    Ok(Json(Nothing {}))
}

fn request(mut fields: Fields, lifetime: Lifetime) -> Result<ServiceRequest, AppError> {
    let number = |least: u32, most: u32| format!("must be a whole number from {least} to {most}");
    let within = |range: &std::ops::RangeInclusive<u32>| number(*range.start(), *range.end());
    let image_id = fields.required("imageId", "must be an image's id, a text of 26 characters", |value| {
        text(value)?.parse::<ImageId>().ok()
    });
    let cpus = fields.optional("cpu", 1, &within(&limits::CPU), whole(limits::CPU));
    let mem_mb = fields.optional(
        "memory",
        limits::SERVICE_MEM_MB_DEFAULT,
        &within(&limits::SERVICE_MEM_MB),
        whole(limits::SERVICE_MEM_MB),
    );
    let port = fields.optional("port", None, &number(1, 65_535), |value| whole(1..=u16::MAX)(value).map(Some));
    let env = env_vars(&mut fields);
    let volume_gb = volume(&mut fields, &within(&limits::VOLUME_GB));
    let request = (|| {
        Some(ServiceRequest {
            image_id: image_id?,
            cpus: cpus?,
            mem_mb: mem_mb?,
            env: env?,
            service: Service { lifetime, port: port?, volume_gb: volume_gb? },
        })
    })();
    fields.finish_leniently(request)
}

/// The disk has two names.
fn volume(fields: &mut Fields, expected: &str) -> Option<Option<u32>> {
    let name = if fields.has("volumeGB") { "volumeGB" } else { "diskSize" };
    fields.optional(name, None, expected, |value| whole(limits::VOLUME_GB)(value).map(Some))
}

/// Values aren't repeated in errors: they are secrets. One that is null isn't set.
fn env_vars(fields: &mut Fields) -> Option<BTreeMap<String, String>> {
    let expected = "must be an object of texts";
    let given = fields.optional("envVars", serde_json::Map::new(), expected, |value| match value {
        Value::Object(given) => Some(given),
        _ => None,
    })?;
    let mut env = BTreeMap::new();
    for (name, value) in given {
        if value.is_null() {
            continue;
        }
        let shown: String = name.chars().take(64).collect();
        if !limits::is_env_name(&name) {
            fields.wrong(
                format!("envVars.{shown}"),
                "is no name of a variable: letters, digits and _, not a digit first",
            );
            continue;
        }
        match text(value).filter(|value| !value.contains('\0')) {
            Some(value) => drop(env.insert(name, value)),
            None => fields.wrong(format!("envVars.{shown}"), "must be a text without NUL"),
        }
    }
    Some(env)
}

async fn list(app: &App, caller: &Caller, mut params: Parameters) -> Result<Json<CakeworkVmPage>, AppError> {
    let image_id = params.optional("imageId", None, "must be an image's id, a text of 26 characters", |text| {
        text.parse::<ImageId>().ok().map(Some)
    })?;
    let states = params.optional(
        "status",
        VmState::ALL.into_iter().filter(|state| *state != VmState::Deleted).collect(),
        "must be created, started, stopped or destroyed",
        states_called,
    )?;
    let after =
        params.optional("pagination", None, "must be what the page before said", |text| cursor_from(text).map(Some))?;
    params.finish("imageId, status, pagination are")?;
    let filter = VmFilter { image_id, states };
    let mut vms = services::service_page(app, caller, &filter, after.as_ref(), PAGE + 1).await?;
    let more = vms.len() > PAGE as usize;
    vms.truncate(PAGE as usize);
    let pagination = if more { vms.last().map(cursor_text) } else { None };
    Ok(Json(CakeworkVmPage { vms: vms.into_iter().map(|vm| shown(app, vm)).collect(), pagination }))
}

fn states_called(word: &str) -> Option<Vec<VmState>> {
    let states: Vec<VmState> = VmState::ALL.into_iter().filter(|state| called(*state) == word).collect();
    if states.is_empty() { None } else { Some(states) }
}

/// A state in the words of this dialect.
fn called(state: VmState) -> &'static str {
    match state {
        VmState::Created | VmState::Starting => "created",
        VmState::Running | VmState::Paused | VmState::Stopping => "started",
        VmState::Stopped | VmState::Error => "stopped",
        VmState::Deleted => "destroyed",
    }
}

/// The VM's id in its last digits, when it was made before them.
fn cursor_text(vm: &Vm) -> String {
    format!("{:x}{}", vm.created_at.as_millis(), vm.id.hex())
}

fn cursor_from(text: &str) -> Option<VmCursor> {
    let (millis, id) = text.split_at_checked(text.len().checked_sub(14)?)?;
    let millis = i64::from_str_radix(millis, 16).ok()?;
    Some(VmCursor { created_at: Timestamp::from_millis(millis), id: format!("vm-{id}").parse().ok()? })
}

fn shown(app: &App, vm: Vm) -> CakeworkVm {
    let hostname = services::hostname(app, &vm);
    let end = match vm.state {
        VmState::Stopped | VmState::Error | VmState::Deleted => vm.end,
        VmState::Created | VmState::Starting | VmState::Running | VmState::Paused | VmState::Stopping => None,
    };
    CakeworkVm {
        id: vm.id.hex().to_owned(),
        hostname,
        cpu: vm.size.cpus,
        memory: vm.size.mem_mb,
        image_id: vm.image_id.to_string(),
        state: called(vm.state),
        created_at: vm.created_at,
        updated_at: vm.updated_at,
        port: vm.service.and_then(|service| service.port),
        volume_gb: vm.service.and_then(|service| service.volume_gb),
        end: end.map(|EndReport { reason, message, exit_code }| CakeworkEnd {
            reason: reason.as_str(),
            message,
            exit_code,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_state_has_a_word_and_every_word_states() {
        for state in VmState::ALL {
            assert!(states_called(called(state)).is_some_and(|states| states.contains(&state)), "{state}");
        }
        assert_eq!(states_called("running"), None);
    }

    proptest! {
        #[test]
        fn a_cursor_reads_back(millis in 0..i64::MAX) {
            let cursor = VmCursor { created_at: Timestamp::from_millis(millis), id: VmId::random() };
            let text = format!("{:x}{}", millis, cursor.id.hex());
            prop_assert_eq!(cursor_from(&text), Some(cursor));
        }

        #[test]
        fn any_text_is_a_cursor_or_none(text in ".{0,40}") {
            cursor_from(&text);
        }
    }
}
