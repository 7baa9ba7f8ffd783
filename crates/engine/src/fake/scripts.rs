//! Scripts in fake VMs: scripted by their text or path like commands; beyond that a program is `console.log(TEXT)`,
//! `result.set(JSON)`, `result.error(JSON)` or anything else, which does nothing.

use std::io;

use tiffin_protocol::{Kind, Script as Request, Source};
use tokio::io::{DuplexStream, ReadHalf, WriteHalf};

use super::{
    Script, Shared,
    guest::{Running, hung_up, play, read_frame},
};

/// Serves one script.
pub(super) async fn serve(
    fake: &Shared,
    request: Request,
    reader: &mut ReadHalf<DuplexStream>,
    writer: &mut WriteHalf<DuplexStream>,
) -> io::Result<()> {
    let _running = Running::new(fake);
    let program = match &request.source {
        Source::Inline => take_program(reader).await?,
        Source::Path(path) => path.clone(),
    };
    let limits = (request.stdout_cap, request.stderr_cap, request.timeout_ms);
    let script = {
        let mut state = fake.lock();
        state.last_script = Some(request);
        state.scripts.get(&program).cloned()
    };
    let script = script.unwrap_or_else(|| meaning(&program));
    tokio::select! {
        played = play(&script, limits, writer) => played,
        () = hung_up(reader) => Ok(()),
    }
}

async fn take_program(reader: &mut ReadHalf<DuplexStream>) -> io::Result<String> {
    let mut text = Vec::new();
    loop {
        match read_frame(reader).await? {
            (Kind::Stdin, bytes) => text.extend(bytes),
            (Kind::StdinEnd, _) => return Ok(String::from_utf8_lossy(&text).into_owned()),
            (kind, _) => return Err(io::Error::other(format!("a {kind:?} frame in a program"))),
        }
    }
}

fn meaning(program: &str) -> Script {
    let argument = |call: &str| program.strip_prefix(call)?.strip_suffix(')').map(str::to_owned);
    if let Some(text) = argument("console.log(") {
        Script { stdout: vec![format!("{text}\n").into_bytes()], ..Script::default() }
    } else if let Some(value) = argument("result.set(") {
        Script { result: format!("{{\"result\":{value}}}").into_bytes(), ..Script::default() }
    } else if let Some(value) = argument("result.error(") {
        Script { result: format!("{{\"error\":{value}}}").into_bytes(), exit_code: 1, ..Script::default() }
    } else {
        Script::default()
    }
}
