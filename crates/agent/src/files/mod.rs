//! Moving files in and out of the guest.
//!
//! ```text
//! host --Op::Files--> [mod] --exec, as the user--> the agent's own program: [tool]
//!                       ^                            |- [unpack] <- [archive] <- [gzip]    stdin
//!                       |                            |- [pack], [content], [list]          stdout
//!                       '---------- slip ------------'  FilesDone or Failure
//! ```
//!
//! Invariants
//! * Nothing is done as root in folders that the guest's user controls: a process of that user does it, with the same
//!   groups, limits and end as a command. A link planted there leads where the user may go anyway.
//! * What is refused, cut short or killed leaves nothing behind: see [`staging`]. (Only a kill in the middle of the last
//!   renames of an upload into folders that are there already can leave a part of it.)
//! * The user may run the tool by hand, and gains nothing: it has no rights but the user's.

pub mod archive;
pub mod content;
pub mod gzip;
pub mod list;
pub mod merge;
pub mod names;
pub mod pack;
pub mod pax;
pub mod place;
pub mod staging;
mod sweep;
pub mod tool;
pub mod unpack;

use std::collections::BTreeMap;
use std::io;
use std::net::TcpStream;
use std::path::Path;

use nix::errno::Errno;
use tiffin_protocol::{Command, Exec, ExecDone, Failure, FailureCode, FileAction, Files, FilesDone, Kind};

use crate::exec::{self, Ended, Frame, Guest, frame};
use crate::handover::{Handover, Slip};
use crate::request::failure;
use tool::Job;

/// What the tool's answer may be, in bytes.
const MAX_ANSWER: u64 = 32 * 1024;

/// Carries out `files` to its end. `early` are bytes that the host sent right behind the request.
pub fn run(guest: &Guest, handover: &Handover, files: &Files, socket: &TcpStream, early: Vec<u8>) -> Ended {
    let slip = match handover.slip(files.uid, files.gid) {
        Ok(slip) => slip,
        Err(error) => {
            return Ended::Failed(failure(FailureCode::Internal, &format!("no place for an answer: {error}")));
        }
    };
    let job = Job::Act { action: files.action.clone(), slip: slip.path().to_owned() };
    let ended = exec::run_then(guest, &command(files, &job), socket, early, |done| {
        if done.timed_out {
            sweep::run(guest, files);
        }
        vec![answer(files, &slip, &done)]
    });
    match ended {
        // What is killed can't clear up after itself.
        Ended::HostGone => sweep::run(guest, files),
        Ended::Failed(failed) => {
            sweep::run(guest, files);
            return Ended::Failed(failed);
        }
        Ended::Answered => {}
    }
    ended
}

/// The tool as a command.
fn command(files: &Files, job: &Job) -> Exec {
    Exec {
        command: Command::Argv(tool::arguments(job)),
        cwd: "/".to_owned(),
        env: BTreeMap::new(),
        image_env: BTreeMap::new(),
        uid: files.uid,
        gid: files.gid,
        timeout_ms: files.timeout_ms,
        stdout_cap: u64::MAX,
        // Only a panic would write there; the answer comes by the slip.
        stderr_cap: 0,
        stdin: matches!(files.action, FileAction::Unpack { .. } | FileAction::Write { .. }),
        terminal: None,
    }
}

/// The last frame: what the tool said, or what became of it.
fn answer(files: &Files, slip: &Slip, done: &ExecDone) -> Frame {
    if done.timed_out {
        let message = format!("not done within {} ms", files.timeout_ms);
        return frame(Kind::Failed, &failure(FailureCode::TimedOut, &message));
    }
    let told = slip.tail(MAX_ANSWER).ok().and_then(|(bytes, _)| serde_json::from_slice(&bytes).ok());
    match told {
        Some(Ok::<FilesDone, Failure>(moved)) => frame(Kind::Done, &moved),
        Some(Err(refused)) => frame(Kind::Failed, &refused),
        None => {
            let message = format!("moving files ended without an answer, with exit code {}", done.exit_code);
            frame(Kind::Failed, &failure(FailureCode::Internal, &message))
        }
    }
}

/// What an error of the file system at `path` means to the host.
fn refusal(error: &io::Error, path: &Path) -> Failure {
    let errno = error.raw_os_error().map(Errno::from_raw);
    let (code, why) = match errno {
        Some(Errno::ENOENT) => (FailureCode::NotFound, "there is no such file or folder"),
        Some(Errno::EACCES | Errno::EPERM | Errno::EROFS) => (FailureCode::Forbidden, "the user may not"),
        Some(Errno::ENOTDIR) => (FailureCode::Forbidden, "a part of it is no folder"),
        Some(Errno::ELOOP) => (FailureCode::Forbidden, "too many links, or a link where none is followed"),
        Some(Errno::ENAMETOOLONG) => (FailureCode::Forbidden, "the name is too long"),
        Some(Errno::ENOSPC | Errno::EDQUOT) => (FailureCode::NoSpace, "the VM's disk is full"),
        Some(errno) => (FailureCode::Internal, errno.desc()),
        None => return failure(FailureCode::Internal, &format!("{}: {error}", shown(path))),
    };
    failure(code, &format!("{}: {why}", shown(path)))
}

/// A path or name in a message: quoted, escaped, and cut where it is endless.
fn shown(path: &Path) -> String {
    const LONGEST: usize = 300;
    let text = path.to_string_lossy();
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{:?}...", &text[..end]),
        None => format!("{text:?}"),
    }
}
