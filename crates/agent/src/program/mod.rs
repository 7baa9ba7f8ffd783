//! The program that the guest is for: who it is ([`user`]), starting it once, why that can't be ([`unfit`]), carrying what it
//! prints ([`carry`]), and the guest's end with it.
//!
//! ```text
//! waiting --start--> running --exit--> [carry]: what is printed by now, Exited --> end the guest, carry to the last word, exit
//!                       '--shutdown--> its signal, the grace --> end the guest, carry to the last word, answer
//! ```
//!
//! Invariants
//! * It is started once: whoever asks again is told so.
//! * Nothing that it, or what it leaves behind, prints before the guest's end is lost.
//! * Who ends the guest is one: the carrier when the program ends by itself, else the shutdown.

pub mod carry;
pub mod unfit;
pub mod user;

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tiffin_protocol::{Command, Failure, FailureCode, Program as Asked, ProgramStarted};

use crate::channel::Channel;
use crate::exec::environment::PATH;
use crate::exec::program::{Program as Words, c_string};
use crate::exec::spawn::{self, Plan, SpawnError};
use crate::exec::streams::{self, AgentEnds};
use crate::exec::{Guest, no_room};
use crate::reaper::Child;
use crate::request::failure;
use crate::wire::poll_timeout;
use carry::Carrier;
use user::User;

/// How long the last output may take on its way to the monitor once every process is gone.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// The one program of the guest.
#[derive(Debug)]
pub struct Program {
    channel: Arc<Channel>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The program's process, once it is started.
    child: Option<Arc<Child>>,
    stop_signal: i32,
    ending: Ending,
    /// Everything that was printed is on its way.
    carried: bool,
}

/// Who ends the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Ending {
    #[default]
    Nobody,
    Carrier,
    Shutdown,
}

impl Program {
    /// None yet; what it prints will go to `channel`.
    pub fn new(channel: Arc<Channel>) -> Arc<Self> {
        Arc::new(Program { channel, state: Mutex::default(), changed: Condvar::new() })
    }

    /// Starts it, unless it was started before.
    ///
    /// # Errors
    /// A failure to answer with: `NotFound` for a missing program, `BadCommand`, `BadUser`, `BadCwd`; another may be asked
    /// for then.
    pub fn start(self: &Arc<Self>, guest: &Arc<Guest>, asked: &Asked) -> Result<ProgramStarted, Failure> {
        let mut state = self.lock();
        if state.child.is_some() || state.ending != Ending::Nobody {
            return Ok(ProgramStarted { already: true });
        }
        let (child, ends) = launch(guest, asked)?;
        let child = Arc::new(child);
        state.child = Some(Arc::clone(&child));
        state.stop_signal = i32::from(asked.stop_signal);
        let carrier = Carrier::new(Arc::clone(self), Arc::clone(guest), Arc::clone(&child), ends);
        let thread = std::thread::Builder::new().name("program".to_owned()).stack_size(crate::listen::STACK);
        if let Err(error) = thread.spawn(move || carrier.run()) {
            // Nobody would read what it prints, nor notice its end.
            crate::processes::end_all(|| crate::processes::session(child.pid()), LAST_WORDS);
            state.child = None;
            return Err(no_room(&error.to_string()));
        }
        Ok(ProgramStarted { already: false })
    }

    /// Ends the guest on request: the program by its own signal first, and what it leaves within what is left of `grace`.
    pub fn shut_down(&self, grace: Duration) {
        let deadline = Instant::now() + grace.min(crate::shutdown::MAX_GRACE);
        let (child, signal) = {
            let mut state = self.lock();
            if state.ending == Ending::Nobody {
                state.ending = Ending::Shutdown;
            }
            (state.child.clone(), state.stop_signal)
        };
        if let Some(child) = &child {
            ask_to_end(child, signal);
            wait_for(child, deadline);
        }
        crate::shutdown::end_guest(deadline.saturating_duration_since(Instant::now()));
        if child.is_some() {
            let wait = self.changed.wait_timeout_while(self.lock(), LAST_WORDS, |state| !state.carried);
            drop(wait.unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// The program has ended: whether the carrier is to end the guest.
    fn ended_by_itself(&self) -> bool {
        let mut state = self.lock();
        if state.ending == Ending::Nobody {
            state.ending = Ending::Carrier;
        }
        state.ending == Ending::Carrier
    }

    fn set_carried(&self) {
        self.lock().carried = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A poisoned lock would mean a panic, which ends the agent anyway.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Asks the program, and nobody else, to end. A stopped one takes the signal only when it goes on.
fn ask_to_end(child: &Child, signal: i32) {
    if child.exit().is_some() || child.pid() <= 1 {
        return;
    }
    // SAFETY: takes no pointers. Real-time signals have no place in `nix`'s list.
    unsafe { libc::kill(child.pid(), signal) };
    // One that is gone already is what was wanted.
    let _ = kill(Pid::from_raw(child.pid()), Signal::SIGCONT);
}

fn wait_for(child: &Child, deadline: Instant) {
    while child.exit().is_none() && Instant::now() < deadline {
        let _ = poll(&mut [PollFd::new(child.wake(), PollFlags::POLLIN)], poll_timeout(deadline));
    }
}

fn launch(guest: &Guest, asked: &Asked) -> Result<(Child, AgentEnds), Failure> {
    let user = user::resolve(&asked.user)?;
    let cwd = if asked.cwd.is_empty() { "/" } else { &asked.cwd };
    make_folder(cwd)?;
    let environment = environment(asked, &user)?;
    let words = Words::of(&Command::Argv(asked.argv.clone()), "", None)?;
    let path = asked.env.get("PATH").map_or(PATH, String::as_str);
    let (ends, child_ends) = streams::pipes(false, user.uid, user.gid).map_err(|errno| no_room(errno.desc()))?;
    let child = guest.reaper.expect().map_err(|error| no_room(&error.to_string()))?;
    let job = guest.jobs.take().map_err(|error| no_room(&error.to_string()))?;
    let plan = Plan {
        candidates: words.candidates(path)?,
        arguments: words.arguments,
        environment,
        cwd: c_string(cwd, "cwd")?,
        uid: user.uid,
        gid: user.gid,
        supplementary: user.groups,
        streams: &child_ends,
        control: None,
        groups: guest.jobs.entries(job.as_ref()),
        same_addresses: false,
    };
    let spawned = spawn::spawn(&plan, &child);
    if spawned.is_err()
        && let Some(job) = job
    {
        guest.jobs.give_back(job);
    }
    match spawned {
        // The job stays the program's for as long as the guest lives.
        Ok(()) => Ok((child, ends)),
        Err(SpawnError::NoRoom(errno)) => Err(no_room(errno.desc())),
        Err(SpawnError::Cwd(errno)) => {
            Err(failure(FailureCode::BadCwd, &format!("can't enter the folder {cwd:?} as that user: {}", errno.desc())))
        }
        Err(SpawnError::Program(errno)) => Err(unfit::explain(&words.name, &plan.candidates, errno)),
        Err(SpawnError::Setup(errno)) => {
            Err(failure(FailureCode::Internal, &format!("the process can't be set up: {}", errno.desc())))
        }
    }
}

/// Makes the working directory where there is none, as images expect it.
fn make_folder(cwd: &str) -> Result<(), Failure> {
    let bad = |why: &str| failure(FailureCode::BadCwd, &format!("the working directory {cwd:?} {why}"));
    match fs::metadata(cwd) {
        Ok(metadata) if metadata.is_dir() => Ok(()),
        Ok(_) => Err(bad("is no directory")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            fs::create_dir_all(Path::new(cwd)).map_err(|error| bad(&format!("can't be made: {error}")))
        }
        Err(error) => Err(bad(&format!("can't be entered: {error}"))),
    }
}

/// The program's own variables, and the three that every program may count on.
fn environment(asked: &Asked, user: &User) -> Result<Vec<CString>, Failure> {
    let hostname = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_default();
    let base = [("PATH", PATH), ("HOME", &user.home), ("HOSTNAME", &hostname)];
    let mut all: BTreeMap<&str, &str> = base.into_iter().collect();
    for (name, value) in &asked.env {
        if name.is_empty() || name.contains('=') {
            return Err(failure(FailureCode::BadRequest, "an environment variable's name is empty or has a ="));
        }
        all.insert(name, value);
    }
    all.into_iter().map(|(name, value)| c_string(&format!("{name}={value}"), "env")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(env: &[(&str, &str)]) -> Asked {
        let env = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Asked { argv: vec!["x".into()], env, cwd: String::new(), user: String::new(), stop_signal: 15 }
    }

    fn user() -> User {
        User { uid: 5, gid: 6, groups: Vec::new(), home: "/home/x".into() }
    }

    #[test]
    fn three_variables_are_added_where_they_are_missing_and_no_more() {
        let all = environment(&asked(&[("A", "b=c\nd"), ("HOME", "/own")]), &user()).unwrap();
        let names: Vec<_> = all.iter().map(|entry| entry.to_str().unwrap().split('=').next().unwrap()).collect();
        assert_eq!(names, ["A", "HOME", "HOSTNAME", "PATH"]);
        assert!(all.contains(&c"A=b=c\nd".to_owned()) && all.contains(&c"HOME=/own".to_owned()));
    }

    #[test]
    fn broken_names_and_nuls_are_refused() {
        for (name, value) in [("", "x"), ("A=B", "x"), ("A", "\0")] {
            assert_eq!(environment(&asked(&[(name, value)]), &user()).unwrap_err().code, FailureCode::BadRequest);
        }
    }

    #[test]
    fn a_file_is_no_working_directory() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        assert_eq!(make_folder(file.to_str().unwrap()).unwrap_err().code, FailureCode::BadCwd);
        assert_eq!(make_folder(file.join("in").to_str().unwrap()).unwrap_err().code, FailureCode::BadCwd);
        let deep = folder.path().join("a/b");
        make_folder(deep.to_str().unwrap()).unwrap();
        assert!(deep.is_dir());
    }
}
