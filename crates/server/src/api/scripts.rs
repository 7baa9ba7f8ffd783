//! `/v1/vms/{id}/run-ts` and `/v1/vms/{id}/run-js`: answered as commands are, with what the script said of itself.

mod flags;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use axum::{
    Json,
    extract::{Extension, State},
    http::HeaderMap,
    response::{IntoResponse, Response},
};
use serde::Serialize;
use serde_json::Value;
use tiffin_protocol::Runtime;
use tiffin_types::{id::VmId, limits, path};
use utoipa::ToSchema;

use super::{
    body::{Fields, JsonObject, text},
    exec::{ExecBody, events, timeout_ms, wants_events},
    layer::RequestId,
    request::Id,
    timing::server_timing,
};
use crate::{
    app::{
        App,
        auth::Caller,
        exec::ExecOutput,
        scripts::{ScriptProgram, ScriptRequest, script_start},
    },
    error::AppError,
};

/// Endings of files that Deno runs, and of those that Node.js runs.
const TS_ENDINGS: [&str; 8] = ["ts", "mts", "cts", "tsx", "js", "mjs", "cjs", "jsx"];
const JS_ENDINGS: [&str; 3] = ["js", "mjs", "cjs"];

/// A TypeScript program to run: `code` or `path`, one of them.
#[derive(ToSchema)]
#[allow(dead_code, reason = "documents what `script_request` reads")]
#[schema(rename_all = "camelCase")]
pub(crate) struct ScriptTsRun {
    /// The program.
    #[schema(min_length = 1, max_length = 1_048_576, example = "result.set({ ok: true, answer: 42 })")]
    code: Option<String>,
    /// A file in the VM, below /workspace: .ts, .mts, .cts, .tsx, .js, .mjs, .cjs or .jsx.
    #[schema(max_length = 4096)]
    path: Option<String>,
    /// The program's arguments.
    #[schema(max_items = 256)]
    args: Option<Vec<String>>,
    /// Environment variables as `NAME=value`; the program may read these and no others.
    #[schema(max_items = 256, example = json!(["BASE_URL=https://api.example.com"]))]
    env: Option<Vec<String>>,
    /// Options of `deno run` that widen no permission and change nothing of what runs; one with a value is `--name=value`.
    #[schema(max_items = 64, example = json!(["--no-check"]))]
    deno_flags: Option<Vec<String>>,
    /// After this many milliseconds it and all it started are killed. The configuration sets the maximum.
    #[schema(minimum = 1, default = 30_000)]
    timeout_ms: Option<u64>,
}

/// A JavaScript program to run: `code` or `path`, one of them.
#[derive(ToSchema)]
#[allow(dead_code, reason = "documents what `script_request` reads")]
#[schema(rename_all = "camelCase")]
pub(crate) struct ScriptJsRun {
    /// The program.
    #[schema(min_length = 1, max_length = 1_048_576, example = "result.set([1, 2, 3].map(n => n * n))")]
    code: Option<String>,
    /// A file in the VM, below /workspace: .js, .mjs or .cjs.
    #[schema(max_length = 4096)]
    path: Option<String>,
    /// The program's arguments.
    #[schema(max_items = 256)]
    args: Option<Vec<String>>,
    /// Environment variables as `NAME=value`.
    #[schema(max_items = 256)]
    env: Option<Vec<String>>,
    /// After this many milliseconds it and all it started are killed. The configuration sets the maximum.
    #[schema(minimum = 1, default = 30_000)]
    timeout_ms: Option<u64>,
}

/// How a script ended, what it wrote, and what it said of itself.
#[derive(Serialize, ToSchema)]
pub(crate) struct ScriptBody {
    #[serde(flatten)]
    exec: ExecBody,
    /// What `result.set` was given last: any JSON value. Absent when it was not called.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Value>, example = json!({"ok": true, "answer": 42}))]
    result: Option<Value>,
    /// What `result.error` was given last, or what was thrown and not caught. Absent when there was neither.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Value>)]
    error: Option<Value>,
}

impl From<ExecOutput> for ScriptBody {
    fn from(mut output: ExecOutput) -> Self {
        let outcome = std::mem::take(&mut output.outcome);
        Self { exec: output.into(), result: outcome.result, error: outcome.error }
    }
}

/// Run TypeScript in a VM
///
/// By Deno, which may read and write `/workspace` and the folder for temporary files, read the environment variables
/// that the request names, and use the network as far as the VM may. `result.set(value)` and `result.error(value)` put
/// a JSON value into the answer; an error, or an exception that nobody caught, gives exit code 1. With
/// `Accept: text/event-stream` the output comes as it does for exec, with `result` and `error` in the last event.
#[utoipa::path(post, path = "/v1/vms/{id}/run-ts", operation_id = "script_ts_run", tag = "Commands",
    request_body = ScriptTsRun, params(("id" = String, Path)),
    responses((status = 200, description = "The script ended", content(
        (ScriptBody = "application/json"), (String = "text/event-stream"))),
        (status = 409), (status = 422), (status = 429), (status = 502), (status = 504)))]
pub(crate) async fn script_ts_run(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(id): Id<VmId>,
    Extension(request_id): Extension<RequestId>,
    headers: HeaderMap,
    body: JsonObject,
) -> Result<Response, AppError> {
    let request = script_request(Runtime::Deno, body.fields(), app.config.exec.max_timeout_ms)?;
    run(&app, &caller, &id, request, &headers, request_id).await
}

/// Run JavaScript in a VM
///
/// By Node.js; otherwise as `run-ts`.
#[utoipa::path(post, path = "/v1/vms/{id}/run-js", operation_id = "script_js_run", tag = "Commands",
    request_body = ScriptJsRun, params(("id" = String, Path)),
    responses((status = 200, description = "The script ended", content(
        (ScriptBody = "application/json"), (String = "text/event-stream"))),
        (status = 409), (status = 422), (status = 429), (status = 502), (status = 504)))]
pub(crate) async fn script_js_run(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(id): Id<VmId>,
    Extension(request_id): Extension<RequestId>,
    headers: HeaderMap,
    body: JsonObject,
) -> Result<Response, AppError> {
    let request = script_request(Runtime::Node, body.fields(), app.config.exec.max_timeout_ms)?;
    run(&app, &caller, &id, request, &headers, request_id).await
}

async fn run(
    app: &Arc<App>,
    caller: &Caller,
    id: &VmId,
    request: ScriptRequest,
    headers: &HeaderMap,
    request_id: RequestId,
) -> Result<Response, AppError> {
    let running = script_start(app, caller, id, request).await?;
    if wants_events(headers) {
        return events::respond(app, running, request_id.0).await;
    }
    let output = running.collect().await?;
    let timing = server_timing("guest", Duration::from_micros(output.done.duration_us));
    Ok((timing, Json(ScriptBody::from(output))).into_response())
}

fn script_request(runtime: Runtime, mut fields: Fields, max_timeout_ms: u64) -> Result<ScriptRequest, AppError> {
    let program = program(&mut fields, runtime);
    let args = fields.texts("args", limits::SCRIPT_ARGS_MAX, |_| Ok(()));
    if args.iter().flatten().map(String::len).sum::<usize>() > limits::SCRIPT_ARGS_BYTES {
        fields.wrong("args", format!("must be at most {} bytes together", limits::SCRIPT_ARGS_BYTES));
    }
    let env = env(&mut fields);
    let (flags, known) = match runtime {
        Runtime::Deno => (
            fields.texts("denoFlags", limits::SCRIPT_FLAGS_MAX, flags::check),
            "code, path, args, env, denoFlags, timeoutMs are",
        ),
        Runtime::Node => (Some(Vec::new()), "code, path, args, env, timeoutMs are"),
    };
    let timeout_ms = timeout_ms(&mut fields, max_timeout_ms);
    let request = (|| {
        let (program, args, env) = (program?, args?, env?);
        Some(ScriptRequest { runtime, program, args, env, flags: flags?, timeout_ms: timeout_ms? })
    })();
    fields.finish_with(request, known)
}

fn program(fields: &mut Fields, runtime: Runtime) -> Option<ScriptProgram> {
    let endings: &[&str] = match runtime {
        Runtime::Deno => &TS_ENDINGS,
        Runtime::Node => &JS_ENDINGS,
    };
    match (fields.take("code"), fields.take("path")) {
        (None, None) => fields.wrong("code", "is missing: give the program as code, or the path of one in the VM"),
        (Some(_), Some(_)) => fields.wrong("path", "can't be given together with code: give one of them"),
        (Some(code), None) => {
            let bytes = limits::SCRIPT_CODE_BYTES;
            if let Some(code) = text(code).filter(|code| bytes.contains(&code.len())) {
                return Some(ScriptProgram::Code(code));
            }
            fields.wrong("code", format!("must be a text of {} to {} bytes", bytes.start(), bytes.end()));
        }
        (None, Some(given)) => match text(given).and_then(|text| text.parse::<path::GuestPath>().ok()) {
            Some(path) if path.extension().is_some_and(|end| endings.contains(&end)) => {
                return Some(ScriptProgram::Path(path));
            }
            Some(_) => fields.wrong("path", format!("must end in one of .{}", endings.join(", ."))),
            None => fields.wrong("path", path::EXPECTED),
        },
    }
    None
}

/// The variables of `["NAME=value"]`.
fn env(fields: &mut Fields) -> Option<BTreeMap<String, String>> {
    let entries = fields.texts("env", limits::ENV_VARS_MAX, |entry| match entry.split_once('=') {
        None => Err("must be NAME=value".into()),
        Some((name, _)) if !limits::is_env_name(name) => {
            Err("must begin with a name of letters, digits and _ that doesn't begin with a digit, and then =".into())
        }
        Some(_) if entry.len() > limits::ENV_VAR_BYTES => {
            Err(format!("must be at most {} bytes", limits::ENV_VAR_BYTES))
        }
        Some(_) => Ok(()),
    })?;
    if entries.iter().map(String::len).sum::<usize>() > limits::ENV_BYTES {
        fields.wrong("env", format!("must be at most {} bytes together", limits::ENV_BYTES));
    }
    let mut env = BTreeMap::new();
    for entry in entries {
        if let Some((name, value)) = entry.split_once('=')
            && env.insert(name.to_owned(), value.to_owned()).is_some()
        {
            fields.wrong("env", format!("names {name} more than once"));
        }
    }
    Some(env)
}
