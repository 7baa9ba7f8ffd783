//! `/v1/vms/{id}/exec`: JSON at the end, or server-sent events as it comes.

pub(super) mod events;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use axum::{
    Json,
    extract::{Extension, State},
    http::{HeaderMap, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use serde_json::Value;
use tiffin_types::{id::VmId, limits, path::WORKSPACE};
use utoipa::ToSchema;

use super::{
    body::{Fields, JsonObject, text, whole},
    layer::RequestId,
    request::Id,
    timing::server_timing,
};
use crate::{
    app::{
        App,
        auth::Caller,
        exec::{ExecOutput, ExecRequest, exec_start},
    },
    error::AppError,
};

/// A command to run.
#[derive(ToSchema)]
#[allow(dead_code, reason = "documents what `exec_request` reads")]
#[schema(rename_all = "camelCase")]
pub(crate) struct ExecCreate {
    /// Run by `bash -lc`, or `sh -lc` where the image has no bash, as user and group 1000.
    #[schema(min_length = 1, max_length = 131_072, example = "echo hello")]
    cmd: String,
    /// Where it runs; an absolute path that exists in the VM.
    #[schema(default = "/workspace", max_length = 4096)]
    cwd: Option<String>,
    /// Environment variables. Names match `[A-Za-z_][A-Za-z0-9_]*`.
    #[schema(example = json!({"LANG": "C.UTF-8"}))]
    env: Option<BTreeMap<String, String>>,
    /// After this many milliseconds it and all it started are killed. The configuration sets the maximum.
    #[schema(minimum = 1, default = 30_000)]
    timeout_ms: Option<u64>,
}

/// How a command ended, and what it wrote.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ExecBody {
    /// Its exit code; 128 and the signal's number when a signal ended it; -1 at the time limit.
    exit_code: i32,
    /// What it wrote, at most 1 MiB; bytes that are no UTF-8 are replaced by U+FFFD.
    #[schema(example = "hello\n")]
    stdout: String,
    /// The same for standard error.
    stderr: String,
    /// Present when the time limit ended it.
    #[serde(skip_serializing_if = "is_false")]
    timed_out: bool,
    /// Present when output was cut at 1 MiB.
    #[serde(skip_serializing_if = "is_false")]
    truncated: bool,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_false(flag: &bool) -> bool {
    !*flag
}

impl From<ExecOutput> for ExecBody {
    fn from(output: ExecOutput) -> Self {
        Self {
            exit_code: output.done.exit_code,
            stdout: lossy(output.stdout),
            stderr: lossy(output.stderr),
            timed_out: output.done.timed_out,
            truncated: output.done.stdout_truncated || output.done.stderr_truncated,
        }
    }
}

/// Without a copy where it is UTF-8 already.
fn lossy(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
}

/// Run a command in a VM
///
/// With `Accept: text/event-stream` its output comes as server-sent events: `stdout` and `stderr` with `{"data": "..."}`,
/// then one `exit` with `{"exitCode": 0}` (and `timedOut`, `truncated` where true), or one `error` with
/// `{"code", "message", "requestId"}`. Closing the connection kills the command. The JSON answer's `Server-Timing`
/// header tells the command's own time in the VM, in milliseconds.
#[utoipa::path(post, path = "/v1/vms/{id}/exec", operation_id = "exec_create", tag = "Commands",
    request_body = ExecCreate, params(("id" = String, Path)),
    responses((status = 200, description = "The command ended", content(
        (ExecBody = "application/json"), (String = "text/event-stream"))),
        (status = 409), (status = 422), (status = 429), (status = 502), (status = 504)))]
pub(crate) async fn exec_create(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(id): Id<VmId>,
    Extension(request_id): Extension<RequestId>,
    headers: HeaderMap,
    body: JsonObject,
) -> Result<Response, AppError> {
    let request = exec_request(body.fields(), app.config.exec.max_timeout_ms)?;
    let running = exec_start(&app, &caller, &id, request).await?;
    if wants_events(&headers) {
        return events::respond(&app, running, request_id.0).await;
    }
    let output = running.collect().await?;
    // The command's own time, by the guest's clock: what is left of the request's is the platform's share.
    let timing = server_timing("guest", Duration::from_micros(output.done.duration_us));
    Ok((timing, Json(ExecBody::from(output))).into_response())
}

pub(super) fn wants_events(headers: &HeaderMap) -> bool {
    let accepted = headers.get_all(header::ACCEPT);
    accepted.iter().filter_map(|value| value.to_str().ok()).any(|value| value.contains("text/event-stream"))
}

fn exec_request(mut fields: Fields, max_timeout_ms: u64) -> Result<ExecRequest, AppError> {
    let bytes = limits::EXEC_CMD_BYTES;
    let expected = format!("must be a text of {} to {} bytes without NUL", bytes.start(), bytes.end());
    let cmd = fields.required("cmd", &expected, |value| {
        text(value).filter(|cmd| bytes.contains(&cmd.len()) && !cmd.contains('\0') && !cmd.trim().is_empty())
    });
    let expected = format!("must be an absolute path of at most {} bytes without NUL", limits::PATH_BYTES);
    let cwd = fields.optional("cwd", WORKSPACE.to_owned(), &expected, |value| {
        text(value).filter(|path| path.starts_with('/') && path.len() <= limits::PATH_BYTES && !path.contains('\0'))
    });
    let env = env(&mut fields);
    let timeout_ms = timeout_ms(&mut fields, max_timeout_ms);
    let request = (|| Some(ExecRequest { cmd: cmd?, cwd: cwd?, env: env?, timeout_ms: timeout_ms? }))();
    fields.finish_with(request, "cmd, cwd, env, timeoutMs are")
}

/// The field `timeoutMs`.
pub(super) fn timeout_ms(fields: &mut Fields, most: u64) -> Option<u64> {
    let expected = format!("must be a whole number from 1 to {most}");
    fields.optional("timeoutMs", limits::EXEC_TIMEOUT_MS_DEFAULT.min(most), &expected, whole(1..=most))
}

fn env(fields: &mut Fields) -> Option<BTreeMap<String, String>> {
    let expected = format!("must be an object of at most {} texts", limits::ENV_VARS_MAX);
    let given = fields.optional("env", serde_json::Map::new(), &expected, |value| match value {
        Value::Object(given) if given.len() <= limits::ENV_VARS_MAX => Some(given),
        _ => None,
    })?;
    let (mut env, mut total) = (BTreeMap::new(), 0);
    for (name, value) in given {
        let shown: String = name.chars().take(64).collect();
        let field = format!("env.{shown}");
        if !limits::is_env_name(&name) {
            fields.wrong(field, "must have a name of letters, digits and _, not beginning with a digit");
            continue;
        }
        let Some(value) = text(value).filter(|value| !value.contains('\0')) else {
            fields.wrong(field, "must be a text without NUL");
            continue;
        };
        let bytes = name.len() + value.len();
        if bytes > limits::ENV_VAR_BYTES {
            fields.wrong(field, format!("must be at most {} bytes, name and value", limits::ENV_VAR_BYTES));
        }
        total += bytes;
        env.insert(name, value);
    }
    if total > limits::ENV_BYTES {
        fields.wrong("env", format!("must be at most {} bytes together", limits::ENV_BYTES));
    }
    Some(env)
}
