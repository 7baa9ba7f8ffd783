//! Running a program in a JavaScript runtime, and what it said of itself.
//!
//! ```text
//! host --Op::Script--> [mod] --exec--> [command]: deno | node, with a prelude before the program
//!                        ^                            |
//!                        '------- [outcome] <--slip---'  result.set, result.error, what was thrown
//! ```
//!
//! A script is a command like any other: same user, groups, limits, streams and end. Inline code is its standard input.
//! Nothing is looked at in `/workspace`: what is missing there, the runtime says on standard error.
//!
//! `values.js` says what values become. Nothing that the preludes write is trusted: `outcome` reads it again.

mod command;
mod outcome;

use std::net::TcpStream;

use tiffin_protocol::{Command, Exec, Failure, FailureCode, Kind, Script, Source};

use crate::exec::{self, Ended, Guest, frame};
use crate::handover::{Handover, Slip};
use crate::request::failure;

/// The preludes, by the name that they have in the handover.
pub const PRELUDES: [(&str, &str); 2] = [
    (command::DENO_PRELUDE, concat!(include_str!("values.js"), include_str!("deno.js"))),
    (command::NODE_PRELUDE, concat!(include_str!("values.js"), include_str!("node.js"))),
];

/// Variables that a script finds unless it is given others: no colours, which would be for a terminal; no question to the
/// world whether there is a newer Deno.
const VARIABLES: [(&str, &str); 2] = [("NO_COLOR", "1"), ("DENO_NO_UPDATE_CHECK", "1")];

/// Runs `script` to its end. `early` are bytes that the host sent right behind the request.
pub fn run(guest: &Guest, handover: &Handover, script: &Script, socket: &TcpStream, early: Vec<u8>) -> Ended {
    let slip = match handover.slip(script.uid, script.gid) {
        Ok(slip) => slip,
        Err(error) => return Ended::Failed(failure(FailureCode::Internal, &format!("no place for a result: {error}"))),
    };
    let exec = match prepare(handover, script, &slip) {
        Ok(exec) => exec,
        Err(refused) => return Ended::Failed(refused),
    };
    let ended = exec::run_then(guest, &exec, socket, early, |mut done| {
        let mut frames = outcome::frames(&slip, script.result_cap, &mut done);
        frames.push(frame(Kind::Done, &done));
        frames
    });
    match ended {
        Ended::Failed(failed) if failed.code == FailureCode::BadCommand => Ended::Failed(missing(script, &failed)),
        ended => ended,
    }
}

fn prepare(handover: &Handover, script: &Script, slip: &Slip) -> Result<Exec, Failure> {
    let arguments = command::of(script, handover, slip.path())?;
    let mut env = script.env.clone();
    for (name, value) in VARIABLES.into_iter().filter(|(name, _)| !script.image_env.contains_key(*name)) {
        env.entry(name.to_owned()).or_insert_with(|| value.to_owned());
    }
    env.insert(command::VARIABLE.to_owned(), format!("{} {}", script.result_cap, slip.path().display()));
    Ok(Exec {
        command: Command::Argv(arguments),
        cwd: command::WORKSPACE.to_owned(),
        env,
        image_env: script.image_env.clone(),
        uid: script.uid,
        gid: script.gid,
        timeout_ms: script.timeout_ms,
        stdout_cap: script.stdout_cap,
        stderr_cap: script.stderr_cap,
        stdin: script.source == Source::Inline,
        terminal: None,
    })
}

fn missing(script: &Script, failed: &Failure) -> Failure {
    let program = command::program(script.runtime);
    let message = format!("{program} can't be run; the VM's image must have it on PATH ({})", failed.message);
    failure(FailureCode::BadCommand, &message)
}
