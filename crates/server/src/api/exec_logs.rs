//! `/v1/vms/{id}/exec-logs`

use std::sync::Arc;

use axum::{Json, extract::State};
use serde::Serialize;
use tiffin_store::ExecLog;
use tiffin_types::{id::VmId, time::Timestamp};
use utoipa::ToSchema;

use super::{
    activity::ActorBody,
    request::{Id, Parameters},
};
use crate::{
    app::{App, auth::Caller, exec_logs},
    error::AppError,
};

const LIMIT: std::ops::RangeInclusive<u32> = 1..=1000;
const LIMIT_DEFAULT: u32 = 100;

/// A run of a command or a script.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ExecLogBody {
    id: String,
    /// When it began.
    #[schema(value_type = String, format = DateTime)]
    at: Timestamp,
    /// `exec`, `run-ts` or `run-js`.
    #[serde(rename = "type")]
    #[schema(example = "exec")]
    kind: &'static str,
    /// `exited`; `timed_out`; `abandoned`, when the client hung up; `failed`, when the VM or its agent did.
    #[schema(example = "exited")]
    outcome: &'static str,
    /// Where it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    exit_code: Option<i32>,
    /// From the request to the end.
    duration_ms: u64,
    timed_out: bool,
    /// Whether output was cut.
    truncated: bool,
    actor: ActorBody,
    #[serde(skip_serializing_if = "Option::is_none")]
    request_id: Option<String>,
    /// The command's beginning, where `exec.log_commands` is set.
    #[serde(skip_serializing_if = "Option::is_none")]
    command: Option<String>,
}

impl From<ExecLog> for ExecLogBody {
    fn from(run: ExecLog) -> Self {
        Self {
            id: run.id,
            at: run.at,
            kind: run.kind.as_str(),
            outcome: run.outcome.as_str(),
            exit_code: run.exit_code,
            duration_ms: run.duration_ms,
            timed_out: run.outcome == tiffin_store::ExecOutcome::TimedOut,
            truncated: run.truncated,
            actor: run.actor.into(),
            request_id: run.request_id,
            command: run.command,
        }
    }
}

/// See what was run in a VM
///
/// When, by whom and how it ended; not what, as command lines hold secrets. Written moments after the end.
#[utoipa::path(get, path = "/v1/vms/{id}/exec-logs", operation_id = "exec_log_list", tag = "Commands",
    params(("id" = String, Path),
        ("limit" = Option<u32>, Query, minimum = 1, maximum = 1000, description = "100 when missing"),
        ("type" = Option<String>, Query, description = "Only `exec`, `run-ts` or `run-js`")),
    responses((status = 200, description = "Runs, newest first", body = Vec<ExecLogBody>)))]
pub(crate) async fn exec_log_list(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(id): Id<VmId>,
    mut parameters: Parameters,
) -> Result<Json<Vec<ExecLogBody>>, AppError> {
    let limit = parameters.optional("limit", LIMIT_DEFAULT, "must be a whole number from 1 to 1000", |text| {
        text.parse().ok().filter(|limit| LIMIT.contains(limit))
    })?;
    let kind =
        parameters.optional("type", None, "must be one of exec, run-ts, run-js", |text| text.parse().ok().map(Some))?;
    parameters.finish("limit and type are")?;
    let list = exec_logs::exec_log_list(&app, &caller, &id, limit, kind).await?;
    Ok(Json(list.into_iter().map(ExecLogBody::from).collect()))
}
