//! Removing what a killed tool left behind, by a tool of the same user: the agent's side.

use std::fs::OpenOptions;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use tiffin_protocol::{FileAction, Files};

use super::tool::{self, Job};
use crate::exec::Guest;
use crate::exec::program::c_string;
use crate::exec::spawn::{Plan, spawn};
use crate::exec::streams::ChildEnds;
use crate::wire::poll_timeout;

/// How long it may take. What it doesn't get to, the next operation there does.
const LIMIT: Duration = Duration::from_secs(20);

/// Sweeps after `files`, when there can be something to sweep. That nothing can be started for it is a line on
/// standard error: the next operation in that folder sweeps, too.
pub(super) fn run(guest: &Guest, files: &Files) {
    match files.action {
        FileAction::Unpack { .. } | FileAction::Write { .. } => {}
        FileAction::Pack { .. } | FileAction::List { .. } | FileAction::Read { .. } => return,
    }
    if let Err(why) = start_and_wait(guest, files) {
        eprintln!("tiffin-agent: not swept after a file operation: {why}");
    }
}

fn start_and_wait(guest: &Guest, files: &Files) -> Result<(), String> {
    let arguments = tool::arguments(&Job::Sweep { action: files.action.clone() });
    let text = |text: &str| c_string(text, "argument").map_err(|refused| refused.message);
    let null = || OpenOptions::new().write(true).open("/dev/null").map_err(|error| error.to_string());
    let streams = ChildEnds::Pipes { stdin: None, stdout: null()?.into(), stderr: null()?.into() };
    let job = guest.jobs.take().map_err(|error| error.to_string())?;
    let plan = Plan {
        candidates: vec![text(&arguments[0])?],
        arguments: arguments.iter().map(|argument| text(argument)).collect::<Result<_, _>>()?,
        environment: Vec::new(),
        cwd: c"/".to_owned(),
        uid: files.uid,
        gid: files.gid,
        supplementary: Vec::new(),
        streams: &streams,
        control: None,
        groups: guest.jobs.entries(job.as_ref()),
        same_addresses: false,
    };
    let child = guest.reaper.expect().map_err(|error| error.to_string())?;
    let ran = spawn(&plan, &child).map_err(|error| error.to_string());
    let deadline = Instant::now() + LIMIT;
    while ran.is_ok() && child.exit().is_none() && Instant::now() < deadline {
        let woken = poll(&mut [PollFd::new(child.wake(), PollFlags::POLLIN)], poll_timeout(deadline));
        if !matches!(woken, Ok(_) | Err(Errno::EINTR)) {
            break;
        }
    }
    if let Some(job) = job {
        if ran.is_ok() && child.exit().is_none() {
            job.end();
        }
        guest.jobs.give_back(job);
    }
    ran
}
