//! One login shell that waits for the next command ([`super::parked`]), so that a command needn't wait for a shell.
//!
//! ```text
//!   empty --wanted, and nobody is held up--> starting --it waits--> waiting --claim--> the command's
//!     ^                                         |                      |
//!     '---------------failed--------------------'<--discard, stale-----'
//! ```
//!
//! A command gets it where it would have been started with just the same: a shell line without input or terminal, by the
//! same user, with the same environment, in the same folder; and only while all that a login shell reads is as it was
//! ([`super::profile`]). Everything else is started afresh, and so is a command that comes while another waits for the
//! shell that starts. Waiting for that one costs no more than starting one's own: it is the same work, begun earlier.
//!
//! The next one is started when a command has ended, or has run for a while: not in the way of the command, and once for
//! each command, so that a guest where nothing is asked for does nothing. There is none where memory is short. It counts in
//! the guest's bound of processes, but is no process of the guest's in an answer to a ping.

use std::io::{ErrorKind, Read};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tiffin_protocol::{Command, Exec};

use super::Guest;
use super::parked::{self, Parked};
use super::profile::Fingerprint;
use super::start::{Login, Running, start_afresh};

/// Who the shell is for.
const USER: u32 = 1000;

/// Where it waits.
const FOLDER: &str = "/workspace";

/// How long a command may run before the next shell is started beside it.
const BESIDE: Duration = Duration::from_millis(300);

/// How long after a command's end the next shell is started: commands that come one right behind the other would wait for
/// it, and are served as fast by shells of their own.
const BREATH: Duration = Duration::from_millis(15);

/// How long a command waits for a shell that starts.
const PATIENCE: Duration = Duration::from_millis(500);

/// How long an end waits for a shell that starts.
const CLOSE_LIMIT: Duration = Duration::from_secs(2);

/// Shells that don't come to wait before no more are tried, until the guest is renewed.
const MAX_FAILURES: u32 = 3;

/// Memory that must be there for others, in kB.
const MIN_MEMORY_KB: u64 = 32 * 1024;

/// The shell that waits, if there is one.
#[derive(Debug)]
pub struct Park {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    slot: Slot,
    /// Whether another is to be started, and not before when.
    wanted: bool,
    not_before: Instant,
    /// Whether a command waits for the shell that starts.
    awaited: bool,
    /// Grows when what is there, or starts, has become useless.
    generation: u64,
    failures: u32,
    /// Shells that somebody ended while they started, since a command came for one.
    ended: u32,
    closed: bool,
}

#[derive(Debug)]
enum Slot {
    Empty,
    Starting,
    Waiting(Box<Ready>),
}

/// A shell that waits, and what it was started with.
#[derive(Debug)]
struct Ready {
    shell: Parked,
    login: Login,
    found: Fingerprint,
}

impl Default for Park {
    fn default() -> Self {
        let state = State {
            slot: Slot::Empty,
            wanted: true,
            not_before: Instant::now(),
            awaited: false,
            generation: 0,
            failures: 0,
            ended: 0,
            closed: false,
        };
        Park { state: Mutex::new(state), changed: Condvar::new() }
    }
}

/// Keeps a shell waiting from now on, in a thread of its own.
pub fn keep(guest: &Arc<Guest>) {
    let guest = Arc::clone(guest);
    let kept = std::thread::Builder::new().name("park".to_owned()).stack_size(crate::listen::STACK).spawn(move || {
        loop {
            let generation = guest.park.next_turn();
            let ready = ready(&guest);
            if let Some(useless) = guest.park.put(ready, generation) {
                useless.shell.running.discard(&guest);
            }
        }
    });
    if let Err(error) = kept {
        eprintln!("tiffin-agent: no shell will wait for commands: {error}");
    }
}

impl Park {
    /// The shell that waits, running `exec` now, if that is the same as starting it afresh.
    pub fn claim(&self, guest: &Guest, exec: &Exec, login: &Login) -> Option<Running> {
        let begun = Instant::now();
        let Command::Shell(line) = &exec.command else { return None };
        let alike = (exec.uid, exec.gid, exec.cwd.as_str()) == (USER, USER, FOLDER)
            && !exec.stdin
            && exec.terminal.is_none()
            && parked::takes(line);
        let mut ready = if alike { self.take(login)? } else { return None };
        if ready.found.still_holds(FOLDER) && ready.shell.release(line).is_ok() {
            ready.shell.running.child.hide(false);
            return Some(Running { started: begun, ..ready.shell.running });
        }
        ready.shell.running.discard(guest);
        None
    }

    /// To be called when a command begins: another shell's start would hold it up.
    pub fn begins(&self) {
        self.lock().not_before = Instant::now() + BESIDE;
    }

    /// To be called when a command has ended.
    pub fn ended(&self) {
        self.lock().not_before = Instant::now() + BREATH;
        self.changed.notify_all();
    }

    /// Ends the shell that waits, or starts; another one will be started.
    pub fn discard(&self, guest: &Guest) {
        let mut state = self.lock();
        state.generation += 1;
        state.failures = 0;
        let useless = state.empty();
        drop(state);
        self.changed.notify_all();
        if let Some(useless) = useless {
            useless.shell.running.discard(guest);
        }
    }

    /// Ends it for good, before the guest ends.
    pub fn close(&self, guest: &Guest) {
        let mut state = self.lock();
        state.closed = true;
        let starting = |state: &mut State| matches!(state.slot, Slot::Starting);
        let waited = self.changed.wait_timeout_while(state, CLOSE_LIMIT, starting);
        drop(waited);
        self.discard(guest);
    }

    /// Takes the shell, when it was started with `login`; waits while it starts, unless another does.
    fn take(&self, login: &Login) -> Option<Box<Ready>> {
        let mut state = self.lock();
        state.ended = 0;
        if matches!(state.slot, Slot::Starting) && !state.awaited {
            state.awaited = true;
            let starting = |state: &mut State| matches!(state.slot, Slot::Starting);
            let waited = self.changed.wait_timeout_while(state, PATIENCE, starting);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            state.awaited = false;
        }
        let fits = match &state.slot {
            Slot::Waiting(ready) => (ready.login.shell, &ready.login.environment) == (login.shell, &login.environment),
            Slot::Empty => true,
            Slot::Starting => false,
        };
        let taken = if fits { state.empty() } else { None };
        drop(state);
        self.changed.notify_all();
        taken
    }

    /// Waits until a shell is to be started; for which generation.
    fn next_turn(&self) -> u64 {
        let mut state = self.lock();
        loop {
            let due =
                state.wanted && matches!(state.slot, Slot::Empty) && !state.closed && state.failures < MAX_FAILURES;
            let now = Instant::now();
            state = if due && now >= state.not_before {
                state.slot = Slot::Starting;
                state.wanted = false;
                return state.generation;
            } else if due {
                let left = state.not_before - now;
                self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
            } else {
                self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
            };
        }
    }

    /// Puts what was started into its place; gives it back when it is useless by now.
    fn put(&self, started: Attempt, generation: u64) -> Option<Box<Ready>> {
        let mut state = self.lock();
        state.slot = Slot::Empty;
        let mut useless = None;
        match started {
            Attempt::Waits(ready) if generation == state.generation => {
                state.slot = Slot::Waiting(ready);
                state.failures = 0;
            }
            Attempt::Waits(ready) => {
                useless = Some(ready);
                state.wanted = true;
            }
            Attempt::Failed => state.failures += 1,
            Attempt::Ended => {
                state.ended += 1;
                state.wanted |= state.ended < MAX_FAILURES;
                state.not_before = Instant::now() + BESIDE;
            }
            Attempt::Refused => {}
        }
        drop(state);
        self.changed.notify_all();
        useless
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Takes what waits, and asks for another.
    fn empty(&mut self) -> Option<Box<Ready>> {
        self.wanted = true;
        match std::mem::replace(&mut self.slot, Slot::Empty) {
            Slot::Waiting(ready) => Some(ready),
            Slot::Empty => None,
            Slot::Starting => {
                self.slot = Slot::Starting;
                None
            }
        }
    }
}

/// What came of starting one.
enum Attempt {
    /// It waits.
    Waits(Box<Ready>),
    /// It was started, and didn't come to wait.
    Failed,
    /// Somebody ended it while it started, as anybody of its user may: that says nothing of the next one.
    Ended,
    /// It wasn't started: it may not be, or there is no room.
    Refused,
}

/// Starts a shell, and returns when it waits.
fn ready(guest: &Guest) -> Attempt {
    let exec = Exec {
        command: Command::Shell(parked::text()),
        cwd: FOLDER.to_owned(),
        env: Default::default(),
        uid: USER,
        gid: USER,
        timeout_ms: 0,
        stdout_cap: 0,
        stderr_cap: 0,
        stdin: false,
        terminal: None,
    };
    let Ok(login) = Login::of(&exec) else { return Attempt::Refused };
    let found = Fingerprint::take(login.shell, &login.home, FOLDER).filter(|_| login.shell.ends_with("/bash"));
    let (Some(found), true, Ok((control, its_control))) = (found, has_memory(), UnixStream::pair()) else {
        return Attempt::Refused;
    };
    let its_control = OwnedFd::from(its_control);
    let again = Login { shell: login.shell, home: login.home.clone(), environment: login.environment.clone() };
    let Ok(running) = start_afresh(guest, &exec, again, Some(&its_control)) else { return Attempt::Refused };
    drop(its_control);
    match Parked::settle(running, control) {
        Ok(shell) => Attempt::Waits(Box::new(Ready { shell, login, found })),
        Err((error, running)) => {
            let gone = error.kind() == ErrorKind::UnexpectedEof
                || error.raw_os_error() == Some(libc::ESRCH)
                || running.child.exit().is_some();
            running.discard(guest);
            if gone {
                return Attempt::Ended;
            }
            eprintln!("tiffin-agent: no shell waits for commands: {error}");
            Attempt::Failed
        }
    }
}

/// Whether others have memory left; a guest that doesn't tell has.
fn has_memory() -> bool {
    let mut text = String::new();
    let read = std::fs::File::open("/proc/meminfo").and_then(|file| file.take(16 * 1024).read_to_string(&mut text));
    let available =
        text.lines().find_map(|line| line.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB")?.parse().ok());
    read.is_err() || available.is_none_or(|available: u64| available >= MIN_MEMORY_KB)
}
