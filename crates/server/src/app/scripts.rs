//! Scripts in VMs: TypeScript and JavaScript by the runtimes in the guest.
//!
//! Invariant: what a script says of itself is the guest's word; it is read within bounds and can break nothing.

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use serde_json::Value;
use tiffin_engine::agent;
use tiffin_protocol::{Outcome, Runtime, Script, Source};
use tiffin_store::ExecKind;
use tiffin_types::{
    account::Scope,
    id::VmId,
    limits::{EXEC_OUTPUT_BYTES, SCRIPT_RESULT_BYTES},
    path::GuestPath,
};

use super::{
    App,
    auth::Caller,
    exec::Running,
    exec_logs::RunNote,
    guest::{GUEST_USER, reach},
};
use crate::error::AppError;

/// A script to run; its fields are within their ranges.
pub(crate) struct ScriptRequest {
    pub(crate) runtime: Runtime,
    pub(crate) program: ScriptProgram,
    pub(crate) args: Vec<String>,
    pub(crate) env: BTreeMap<String, String>,
    pub(crate) flags: Vec<String>,
    pub(crate) timeout_ms: u64,
}

/// What a script is.
pub(crate) enum ScriptProgram {
    /// This text.
    Code(String),
    /// A file in the guest.
    Path(GuestPath),
}

/// Starts a script.
pub(crate) async fn script_start(
    app: &Arc<App>,
    caller: &Caller,
    id: &VmId,
    request: ScriptRequest,
) -> Result<Running, AppError> {
    caller.require(Scope::Write)?;
    let began = Instant::now();
    let (guest, connection, token) = reach(app, caller, id).await?;
    let (timeout_ms, image_env) = (request.timeout_ms, guest.image_env().await?);
    let kind = match request.runtime {
        Runtime::Deno => ExecKind::RunTs,
        Runtime::Node => ExecKind::RunJs,
    };
    let shown = match &request.program {
        ScriptProgram::Code(code) => code.as_str(),
        ScriptProgram::Path(path) => path.as_str(),
    };
    let mut note = RunNote::begin(app, caller, id, kind, shown);
    let (source, code) = match request.program {
        ScriptProgram::Code(code) => (Source::Inline, code.into_bytes()),
        ScriptProgram::Path(path) => (Source::Path(path.to_string()), Vec::new()),
    };
    let script = Script {
        runtime: request.runtime,
        source,
        args: request.args,
        env: request.env,
        image_env,
        flags: request.flags,
        network: guest.vm.egress.allows_something(),
        uid: GUEST_USER,
        gid: GUEST_USER,
        timeout_ms,
        stdout_cap: EXEC_OUTPUT_BYTES as u64,
        stderr_cap: EXEC_OUTPUT_BYTES as u64,
        result_cap: SCRIPT_RESULT_BYTES as u64,
    };
    let stream = note.started(guest.begin(agent::script(connection, &token, script, code)).await)?;
    Ok(Running::new(guest, note, stream, began, timeout_ms))
}

/// The outcome in what the guest sent. What can't be read (broken, nested over 128 deep, numbers that are none) is
/// an error of the script's.
pub(super) fn outcome(sent: Option<Vec<u8>>) -> Outcome {
    let Some(sent) = sent else { return Outcome::default() };
    serde_json::from_slice(&sent).unwrap_or_else(|_| Outcome {
        result: None,
        error: Some(Value::from("the script's result can't be read: it is no JSON, or nested too deeply")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn read(text: &str) -> Outcome {
        outcome(Some(text.as_bytes().to_vec()))
    }

    #[test]
    fn a_result_is_any_json_and_null_is_one() {
        assert_eq!(outcome(None), Outcome::default());
        assert_eq!(read("{}"), Outcome::default());
        assert_eq!(read("{\"result\":null}").result, Some(json!(null)));
        assert_eq!(read("{\"result\":[1,\"a\",2.5]}").result, Some(json!([1, "a", 2.5])));
        let both = read("{\"result\":0,\"error\":{\"message\":\"x\"}}");
        assert_eq!((both.result, both.error), (Some(json!(0)), Some(json!({ "message": "x" }))));
    }

    #[test]
    fn what_is_no_outcome_is_an_error_of_the_scripts() {
        let deep = format!("{{\"result\":{}{}}}", "[".repeat(10_000), "]".repeat(10_000));
        for broken in ["", "{", "7", "\u{0}", "{\"result\":1e999}", "{\"result\":}", "{} {}", &deep] {
            let outcome = read(broken);
            assert!(outcome.result.is_none() && outcome.error.is_some(), "{broken:.40}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes: Vec<u8>) {
            let _ = outcome(Some(bytes));
        }
    }
}
