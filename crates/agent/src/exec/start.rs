//! Starting a command: by a shell that waits for one ([`super::park`]) where that makes no difference, else afresh.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::time::Instant;

use tiffin_protocol::{Exec, Failure, FailureCode};

use super::environment::{self, Account};
use super::profile;
use super::program::{self, Program};
use super::spawn::{self, Plan, SpawnError};
use super::streams::{self, AgentEnds, ChildEnds};
use super::{Guest, end, internal, no_room, terminal};
use crate::init;
use crate::jobs::Job;
use crate::reaper::Child;
use crate::request::failure;

/// A command that runs.
#[derive(Debug)]
pub struct Running {
    /// Its group, where the guest has groups.
    pub job: Option<Job>,
    /// Its first process.
    pub child: Child,
    /// The agent's ends of its streams.
    pub ends: AgentEnds,
    /// Since when.
    pub started: Instant,
}

impl Running {
    /// Ends all of it, for nobody.
    pub fn discard(self, guest: &Guest) {
        end(self.job.as_ref(), &self.child);
        if let Some(job) = self.job {
            guest.jobs.give_back(job);
        }
    }
}

/// What a command is given by who it runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Login {
    /// The guest's best shell.
    pub shell: &'static str,
    /// Who it runs as.
    pub account: Account,
    /// The image's environment, which is in the other.
    pub image_env: BTreeMap<String, String>,
    /// `NAME=value`.
    pub environment: Vec<CString>,
}

impl Login {
    /// For `exec`, as the guest is at this moment.
    ///
    /// # Errors
    /// `BadRequest` for an environment that can't be.
    pub fn of(exec: &Exec) -> Result<Self, Failure> {
        let account = Account::of(exec.uid);
        let shell = program::shell();
        let environment = environment::merged(&account, shell, exec.terminal.is_some(), &exec.image_env, &exec.env)?;
        Ok(Login { shell, account, image_env: exec.image_env.clone(), environment })
    }

    /// Whether `exec`, of the same user and without a terminal, would be given the same as long as the guest is as it was.
    pub fn is_for(&self, exec: &Exec) -> bool {
        // Nothing to compare where the command brings nothing of its own.
        (exec.env.is_empty() && exec.image_env == self.image_env)
            || environment::merged(&self.account, self.shell, false, &exec.image_env, &exec.env)
                .is_ok_and(|environment| environment == self.environment)
    }
}

/// Starts `exec`.
///
/// # Errors
/// A failure to answer with; nothing runs then.
pub fn start(guest: &Guest, exec: &Exec) -> Result<Running, Failure> {
    if exec.terminal.is_some() && !exec.stdin {
        let rule = "a command with a terminal has standard input, so stdin must be true";
        return Err(failure(FailureCode::BadRequest, rule));
    }
    match guest.park.claim(guest, exec) {
        Some(running) => Ok(running),
        None => start_afresh(guest, exec, Login::of(exec)?, None),
    }
}

/// Starts `exec` in a process of its own, which gets `control` besides its streams.
///
/// # Errors
/// As [`start`].
pub fn start_afresh(guest: &Guest, exec: &Exec, login: Login, control: Option<&OwnedFd>) -> Result<Running, Failure> {
    let chosen = exec.env.get("PATH").or(exec.image_env.get("PATH")).map(String::as_str);
    let kept = chosen.filter(|_| !profile::keeps_path());
    let program = Program::of(&exec.command, login.shell, kept)?;
    let candidates = program.candidates(chosen.unwrap_or(environment::PATH))?;
    let cwd = program::c_string(&exec.cwd, "cwd")?;
    let (ends, child_ends) = open_streams(exec)?;
    let child = guest.reaper.expect().map_err(|error| no_room(&error.to_string()))?;
    child.hide(control.is_some());
    let job = guest.jobs.take().map_err(|error| no_room(&error.to_string()))?;
    let plan = Plan {
        candidates,
        arguments: program.arguments,
        environment: login.environment,
        cwd,
        uid: exec.uid,
        gid: exec.gid,
        supplementary: Vec::new(),
        streams: &child_ends,
        control,
        groups: guest.jobs.entries(job.as_ref()),
        same_addresses: init::is_emulated(),
    };
    let started = Instant::now();
    match spawn::spawn(&plan, &child) {
        Ok(()) => Ok(Running { job, child, ends, started }),
        Err(error) => {
            if let Some(job) = job {
                guest.jobs.give_back(job);
            }
            Err(refused(&error, exec))
        }
    }
}

fn open_streams(exec: &Exec) -> Result<(AgentEnds, ChildEnds), Failure> {
    match exec.terminal {
        Some(size) => streams::terminal(terminal::check(size)?, exec.uid, exec.gid),
        None => streams::pipes(exec.stdin, exec.uid, exec.gid),
    }
    .map_err(|errno| no_room(errno.desc()))
}

fn refused(error: &SpawnError, exec: &Exec) -> Failure {
    match error {
        SpawnError::NoRoom(errno) => no_room(errno.desc()),
        SpawnError::Cwd(errno) => {
            failure(FailureCode::BadCwd, &format!("can't enter the folder {:?}: {}", exec.cwd, errno.desc()))
        }
        SpawnError::Program(errno) => {
            failure(FailureCode::BadCommand, &format!("can't run the program: {}", errno.desc()))
        }
        SpawnError::Setup(errno) => internal(errno.desc()),
    }
}
