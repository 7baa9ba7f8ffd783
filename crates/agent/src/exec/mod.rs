//! Running one command: what to start ([`program`], [`environment`]), starting it ([`start`], [`spawn`]), or giving it to
//! a shell that waits ([`park`], [`parked`], [`patch`], [`profile`]), carrying its streams until it ends ([`streams`],
//! [`terminal`], [`pump`]), and ending whatever it started when the host or the clock says so.
//!
//! ```text
//! take a job -> spawn --,
//! a shell that waits ---'-> pump --exit--------------------------> Done
//!                            |--time limit--> end the job, pump --> Done (timed out)
//!                            '--host gone---> end the job
//! ```
//!
//! Background processes that a command leaves behind at its own end live on.

pub mod environment;
pub mod park;
pub mod parked;
pub mod patch;
pub mod profile;
pub mod program;
pub mod pump;
pub mod spawn;
pub mod start;
pub mod stdin;
pub mod streams;
pub mod terminal;

use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tiffin_protocol::{Exec, ExecDone, Failure, FailureCode, Kind};

use crate::jobs::{Job, Jobs};
use crate::reaper::{Child, Reaper};
use crate::request::failure;
use park::Park;
use pump::{Pump, Stop};
use start::Running;
use stdin::Violation;

/// How long the processes that are ended may take to vanish.
const KILL_LIMIT: Duration = Duration::from_secs(3);

/// The longest time limit; a longer one is as good as this.
const MAX_TIMEOUT: Duration = Duration::from_secs(7 * 24 * 3600);

/// What commands need of the guest.
#[derive(Debug)]
pub struct Guest {
    /// Their groups.
    pub jobs: Jobs,
    /// Who waits for them.
    pub reaper: Arc<Reaper>,
    /// The shell that waits for the next one.
    pub park: Park,
}

impl Guest {
    /// Whose commands run in `jobs` and are waited for by `reaper`.
    pub fn new(jobs: Jobs, reaper: Arc<Reaper>) -> Self {
        Guest { jobs, reaper, park: Park::default() }
    }
}

/// A frame to send.
pub type Frame = (Kind, Vec<u8>);

/// A frame that says `value`, which must be of strings, numbers and such alone.
pub fn frame(kind: Kind, value: &impl serde::Serialize) -> Frame {
    (kind, serde_json::to_vec(value).expect("strings and numbers are JSON"))
}

/// How an exec ended, seen from its connection.
#[derive(Debug)]
pub enum Ended {
    /// The last frame is sent.
    Answered,
    /// To be answered with this.
    Failed(Failure),
    /// Nobody is there to answer.
    HostGone,
}

/// Runs `exec` to its end. `early` are bytes that the host sent right behind the request.
pub fn run(guest: &Guest, exec: &Exec, socket: &TcpStream, early: Vec<u8>) -> Ended {
    run_then(guest, exec, socket, early, |done| vec![frame(Kind::Done, &done)])
}

/// As [`run`], but `last` makes the last frames of what [`run`] would have answered with, each of them shorter than a
/// frame's maximum.
pub fn run_then(
    guest: &Guest,
    exec: &Exec,
    socket: &TcpStream,
    early: Vec<u8>,
    last: impl FnOnce(ExecDone) -> Vec<Frame>,
) -> Ended {
    let _busy = guest.park.begins();
    let Running { job, child, ends, started } = match start::start(guest, exec) {
        Ok(running) => running,
        Err(failed) => return Ended::Failed(failed),
    };
    let pump = Pump::new(socket, &child, ends, exec, early);
    let ended = carry(pump, job.as_ref(), &child, started, exec.timeout_ms, last);
    if let Some(job) = job {
        guest.jobs.give_back(job);
    }
    ended
}

/// Carries a command's streams to its end, and ends it where it doesn't end by itself.
fn carry(
    mut pump: Pump<'_>,
    job: Option<&Job>,
    child: &Child,
    started: Instant,
    timeout_ms: u64,
    last: impl FnOnce(ExecDone) -> Vec<Frame>,
) -> Ended {
    let stop = pump.run(Some(started + Duration::from_millis(timeout_ms).min(MAX_TIMEOUT)));
    let timed_out = stop == Stop::TimeLimit;
    if stop != Stop::Exited {
        end(job, child);
    }
    match stop {
        Stop::HostGone => return Ended::HostGone,
        Stop::Broken(violation) => return Ended::Failed(broken(violation)),
        Stop::TimeLimit if pump.run(Some(Instant::now() + KILL_LIMIT)) == Stop::HostGone => return Ended::HostGone,
        Stop::TimeLimit | Stop::Exited => {}
    }
    let exit = child.exit();
    let ended_at = exit.map_or_else(Instant::now, |exit| exit.at);
    let done = ExecDone {
        exit_code: exit.filter(|_| !timed_out).map_or(-1, |exit| exit.code),
        timed_out,
        stdout_truncated: pump.truncated(Kind::Stdout),
        stderr_truncated: pump.truncated(Kind::Stderr),
        duration_us: u64::try_from(ended_at.duration_since(started).as_micros()).unwrap_or(u64::MAX),
    };
    pump.finish(&last(done))
}

/// Ends everything that the command started: its job, or what its session and descent show.
fn end(job: Option<&Job>, child: &Child) {
    let all_ended = match job {
        Some(job) => job.end(),
        None => crate::processes::end_all(|| crate::processes::session(child.pid()), KILL_LIMIT),
    };
    if !all_ended {
        eprintln!("tiffin-agent: some processes of command {} would not end", child.pid());
    }
}

fn broken(violation: Violation) -> Failure {
    failure(FailureCode::BadRequest, &format!("standard input broke the protocol: {violation}"))
}

pub(crate) fn no_room(why: &str) -> Failure {
    failure(FailureCode::NoRoom, &format!("no room for another process: {why}"))
}

fn internal(why: &str) -> Failure {
    failure(FailureCode::Internal, &format!("the command's process can't be set up: {why}"))
}
