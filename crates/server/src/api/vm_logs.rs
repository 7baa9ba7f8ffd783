//! `/v1/vms/{id}/logs`

use std::sync::Arc;

use axum::{Json, extract::State};
use serde::Serialize;
use tiffin_engine::LogKind;
use tiffin_types::{id::VmId, limits, time::Timestamp};
use utoipa::ToSchema;

use super::request::{Id, Parameters};
use crate::{
    app::{App, auth::Caller, vms},
    error::AppError,
};

/// The contract's names, whichever engine runs.
const TYPES: [(&str, LogKind); 3] = [
    ("firecracker.log", LogKind::Engine),
    ("firecracker.stdout.log", LogKind::Console),
    ("firecracker.stderr.log", LogKind::EngineErrors),
];

/// The last lines of a log.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct VmLogs {
    #[serde(rename = "type")]
    #[schema(example = "firecracker.stdout.log")]
    kind: &'static str,
    /// Oldest first.
    lines: Vec<String>,
    /// Whether there were more lines before.
    truncated: bool,
    /// When the log was last written.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    updated_at: Option<Timestamp>,
}

/// Read a VM's logs
///
/// `firecracker.log` is the engine's own log, `firecracker.stdout.log` what the guest wrote to its console, and
/// `firecracker.stderr.log` the engine's errors, whichever engine runs the VM.
#[utoipa::path(get, path = "/v1/vms/{id}/logs", operation_id = "vm_log_get", tag = "VMs",
    params(("id" = String, Path),
        ("type" = Option<String>, Query, description = "firecracker.log (default), firecracker.stdout.log or firecracker.stderr.log"),
        ("tail" = Option<u32>, Query, minimum = 1, maximum = 1000, description = "Lines; 200 when missing")),
    responses((status = 200, description = "The last lines", body = VmLogs)))]
pub(crate) async fn vm_log_get(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(id): Id<VmId>,
    mut parameters: Parameters,
) -> Result<Json<VmLogs>, AppError> {
    let names: Vec<&str> = TYPES.iter().map(|(name, _)| *name).collect();
    let (kind, log) =
        parameters.optional("type", TYPES[0], &format!("must be one of {}", names.join(", ")), |text| {
            TYPES.into_iter().find(|(name, _)| *name == text)
        })?;
    let range = limits::LOG_TAIL;
    let expected = format!("must be a whole number from {} to {}", range.start(), range.end());
    let tail = parameters.optional("tail", limits::LOG_TAIL_DEFAULT, &expected, |text| {
        text.parse().ok().filter(|lines| range.contains(lines))
    })?;
    parameters.finish("type and tail are")?;
    let tail = vms::vm_logs(&app, &caller, &id, log, usize::try_from(tail).unwrap_or(usize::MAX)).await?;
    Ok(Json(VmLogs {
        kind,
        lines: tail.lines,
        truncated: tail.truncated,
        updated_at: tail.updated_at_ms.map(Timestamp::from_millis),
    }))
}
