//! One login shell that waits for the next command ([`super::parked`]), so that a command needn't wait for a shell.
//!
//! ```text
//!   empty --wanted, and no command runs--> starting --it waits--> waiting --claim--> the command's
//!     ^                                       |                      |
//!     '---------------failed------------------'<--discard, stale-----'
//! ```
//!
//! A command gets it where it would have been started with just the same: a shell line without input or terminal, by the
//! same user, with the same environment, in the same folder; and only while all that a login shell reads is as it was
//! ([`super::profile`]). Everything else is started afresh, and so is a command that comes while another waits for the
//! shell that starts. Waiting for that one costs no more than starting one's own: it is the same work, begun earlier.
//! Whether a command can use it is decided before it waits. The image's environment comes with commands: the first one tells it,
//! where there is one, and from then on the shell has it from its start.
//!
//! The next one is started when no command runs: not in the way of one, nor to be seen by it, and once for each command
//! that wanted it, so that a guest where nothing is asked for does nothing. There is none where memory is short. It counts
//! in the guest's bound of processes, but is no process of the guest's in an answer to a ping.

use std::collections::BTreeMap;
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

/// How long after a command's end the next shell is started: commands that come one right behind the other would wait for
/// it, and are served as fast by shells of their own.
const BREATH: Duration = Duration::from_millis(15);

/// How long after somebody has ended a shell that started the next one is.
const PAUSE: Duration = Duration::from_millis(300);

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
    /// Commands that run.
    running: usize,
    /// Grows when what is there, or starts, has become useless.
    generation: u64,
    failures: u32,
    /// Shells that somebody ended while they started, since a command came for one.
    ended: u32,
    closed: bool,
    /// What commands bring of their image.
    image_env: BTreeMap<String, String>,
}

#[derive(Debug)]
enum Slot {
    Empty,
    Starting {
        origin: Arc<Origin>,
        generation: u64,
        /// Whether a command waits for it, or has waited in vain.
        awaited: bool,
    },
    Waiting(Box<Ready>),
}

/// What a shell is started with, and what it finds.
#[derive(Debug)]
struct Origin {
    login: Login,
    found: Fingerprint,
}

/// A shell that waits.
#[derive(Debug)]
struct Ready {
    shell: Parked,
    origin: Arc<Origin>,
}

/// A command that runs, until it is dropped: no shell is started beside it.
#[derive(Debug)]
pub struct Busy<'a>(&'a Park);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.running -= 1;
        if state.running == 0 {
            state.not_before = state.not_before.max(Instant::now() + BREATH);
            drop(state);
            self.0.changed.notify_all();
        }
    }
}

impl Default for Park {
    fn default() -> Self {
        let state = State {
            slot: Slot::Empty,
            wanted: true,
            not_before: Instant::now(),
            running: 0,
            generation: 0,
            failures: 0,
            ended: 0,
            closed: false,
            image_env: BTreeMap::new(),
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
            let attempt = match Origin::of_now(guest.park.image_env()).map(Arc::new) {
                Some(origin) if guest.park.starts(&origin, generation) => ready(&guest, origin),
                Some(_) => continue,
                None => Attempt::Refused,
            };
            if let Some(useless) = guest.park.put(attempt, generation) {
                useless.shell.running.discard(&guest);
            }
        }
    });
    if let Err(error) = kept {
        eprintln!("tiffin-agent: no shell will wait for commands: {error}");
    }
}

impl Park {
    /// To be held while a command runs.
    pub fn begins(&self) -> Busy<'_> {
        self.lock().running += 1;
        Busy(self)
    }

    /// The shell that waits, running `exec` now, if that is the same as starting it afresh.
    pub fn claim(&self, guest: &Guest, exec: &Exec) -> Option<Running> {
        let begun = Instant::now();
        if self.learns(exec) {
            self.discard(guest);
            return None;
        }
        let (line, origin) = self.expected(exec)?;
        if !origin.found.still_holds(FOLDER) {
            self.forget(guest, &origin);
            return None;
        }
        let (mut ready, has_waited) = self.take(&origin)?;
        if (!has_waited || origin.found.still_holds(FOLDER)) && ready.shell.release(line).is_ok() {
            ready.shell.running.child.hide(false);
            return Some(Running { started: begun, ..ready.shell.running });
        }
        ready.shell.running.discard(guest);
        None
    }

    /// Whether `exec`, for which one might wait, brings another environment of the image than was known.
    fn learns(&self, exec: &Exec) -> bool {
        let mut state = self.lock();
        let is_new = line_for_one(exec).is_some() && state.image_env != exec.image_env;
        if is_new {
            state.image_env.clone_from(&exec.image_env);
        }
        is_new
    }

    fn image_env(&self) -> BTreeMap<String, String> {
        self.lock().image_env.clone()
    }

    /// Ends the shell that waits, or starts; another one will be started.
    pub fn discard(&self, guest: &Guest) {
        let mut state = self.lock();
        state.generation += 1;
        state.failures = 0;
        state.wanted = true;
        let useless = state.empty_of(None);
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
        let starting = |state: &mut State| matches!(state.slot, Slot::Starting { .. });
        let waited = self.changed.wait_timeout_while(state, CLOSE_LIMIT, starting);
        drop(waited);
        self.discard(guest);
    }

    /// The line of `exec`, and the origin of the shell that waits for it, or starts; another one is wanted from now on.
    fn expected<'a>(&self, exec: &'a Exec) -> Option<(&'a str, Arc<Origin>)> {
        let line = line_for_one(exec)?;
        let mut state = self.lock();
        (state.wanted, state.ended) = (true, 0);
        let origin = match &state.slot {
            Slot::Waiting(ready) => Arc::clone(&ready.origin),
            Slot::Starting { origin, generation, awaited: false } if *generation == state.generation => {
                Arc::clone(origin)
            }
            Slot::Starting { .. } | Slot::Empty => return None,
        };
        drop(state);
        origin.login.is_for(exec).then_some((line, origin))
    }

    /// Takes the shell that was started with `origin`, if nobody else has; waits while it starts. Whether it did.
    fn take(&self, origin: &Arc<Origin>) -> Option<(Box<Ready>, bool)> {
        let mut state = self.lock();
        let waits = match &mut state.slot {
            Slot::Starting { origin: starting, awaited, .. } if Arc::ptr_eq(starting, origin) => {
                !std::mem::replace(awaited, true)
            }
            Slot::Starting { .. } | Slot::Waiting(_) | Slot::Empty => false,
        };
        if waits {
            let starts = |state: &mut State| matches!(state.slot, Slot::Starting { .. });
            let waited = self.changed.wait_timeout_while(state, PATIENCE, starts);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Some((state.empty_of(Some(origin))?, waits))
    }

    /// Ends the shell that was started with `origin`, which is of no use any more.
    fn forget(&self, guest: &Guest, origin: &Arc<Origin>) {
        let mut state = self.lock();
        if matches!(&state.slot, Slot::Starting { origin: starting, .. } if Arc::ptr_eq(starting, origin)) {
            state.generation += 1;
        }
        let useless = state.empty_of(Some(origin));
        drop(state);
        if let Some(useless) = useless {
            useless.shell.running.discard(guest);
        }
    }

    /// Waits until a shell is to be started; for which generation.
    fn next_turn(&self) -> u64 {
        let mut state = self.lock();
        loop {
            let left = state.not_before.saturating_duration_since(Instant::now());
            state = if !state.is_due() {
                self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
            } else if left.is_zero() {
                state.wanted = false;
                return state.generation;
            } else {
                self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
            };
        }
    }

    /// Begins to start one, unless a command has come first, or its generation is over.
    fn starts(&self, origin: &Arc<Origin>, generation: u64) -> bool {
        let mut state = self.lock();
        let goes = state.has_room() && state.generation == generation;
        if goes {
            state.slot = Slot::Starting { origin: Arc::clone(origin), generation, awaited: false };
        } else {
            state.wanted = true;
        }
        goes
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
                state.not_before = Instant::now() + PAUSE;
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
    /// Whether a shell is to be started, be it a little later.
    fn is_due(&self) -> bool {
        self.wanted && self.has_room() && self.failures < MAX_FAILURES
    }

    /// Whether one may be started: there is none, and no command that it would be beside.
    fn has_room(&self) -> bool {
        matches!(self.slot, Slot::Empty) && self.running == 0 && !self.closed
    }

    /// Takes what waits; only what was started with `origin`, where one is given.
    fn empty_of(&mut self, origin: Option<&Arc<Origin>>) -> Option<Box<Ready>> {
        match std::mem::replace(&mut self.slot, Slot::Empty) {
            Slot::Waiting(ready) if origin.is_none_or(|origin| Arc::ptr_eq(origin, &ready.origin)) => Some(ready),
            other => {
                self.slot = other;
                None
            }
        }
    }
}

impl Origin {
    /// For a shell that starts now; none where it may not start early.
    fn of_now(image_env: BTreeMap<String, String>) -> Option<Self> {
        let exec = exec(image_env);
        let login = Login::of(&exec).ok().filter(|login| login.shell.ends_with("/bash"))?;
        let found = Fingerprint::take(login.shell, &login.account.home, FOLDER)?;
        // Looked up again: what has changed before it was stamped would not be noticed.
        let same = Login::of(&exec).is_ok_and(|again| again == login);
        (same && has_memory()).then_some(Origin { login, found })
    }
}

/// The line of a command that one waits for.
fn line_for_one(exec: &Exec) -> Option<&str> {
    let Command::Shell(line) = &exec.command else { return None };
    let alike = (exec.uid, exec.gid, exec.cwd.as_str()) == (USER, USER, FOLDER)
        && !exec.stdin
        && exec.terminal.is_none()
        && parked::takes(line);
    alike.then_some(line)
}

/// What is started to wait.
fn exec(image_env: BTreeMap<String, String>) -> Exec {
    Exec {
        command: Command::Shell(parked::text()),
        cwd: FOLDER.to_owned(),
        env: Default::default(),
        image_env,
        uid: USER,
        gid: USER,
        timeout_ms: 0,
        stdout_cap: 0,
        stderr_cap: 0,
        stdin: false,
        terminal: None,
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
fn ready(guest: &Guest, origin: Arc<Origin>) -> Attempt {
    let Ok((control, its_control)) = UnixStream::pair() else { return Attempt::Refused };
    let its_control = OwnedFd::from(its_control);
    let running = start_afresh(guest, &exec(origin.login.image_env.clone()), origin.login.clone(), Some(&its_control));
    let Ok(running) = running else { return Attempt::Refused };
    drop(its_control);
    match Parked::settle(running, control) {
        Ok(shell) => Attempt::Waits(Box::new(Ready { shell, origin })),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exec::environment::Account;

    fn origin() -> Arc<Origin> {
        let account = Account { name: "user".to_owned(), home: FOLDER.to_owned() };
        let environment =
            crate::exec::environment::merged(&account, "/bin/bash", false, &BTreeMap::new(), &BTreeMap::new()).unwrap();
        let login = Login { shell: "/bin/bash", account, image_env: BTreeMap::new(), environment };
        Arc::new(Origin { login, found: Fingerprint::default() })
    }

    fn starting(park: &Park, origin: &Arc<Origin>) -> u64 {
        let generation = park.next_turn();
        assert!(park.starts(origin, generation));
        generation
    }

    fn line() -> Exec {
        Exec { command: Command::Shell("echo hi".to_owned()), ..exec(BTreeMap::new()) }
    }

    #[test]
    fn what_cannot_use_the_shell_that_starts_does_not_wait_for_it() {
        let (park, origin) = (Park::default(), origin());
        starting(&park, &origin);
        let env = |name: &str, value: &str| [(name.to_owned(), value.to_owned())].into();
        let others = [
            Exec { env: env("A", "b"), ..line() },
            Exec { env: env("HOME", "/elsewhere"), ..line() },
            Exec { image_env: env("A", "b"), ..line() },
            Exec { cwd: "/tmp".to_owned(), ..line() },
            Exec { uid: 0, ..line() },
            Exec { stdin: true, ..line() },
            Exec { command: Command::Argv(vec!["true".to_owned()]), ..line() },
        ];
        for other in others {
            assert!(park.expected(&other).is_none(), "{other:?}");
        }
        for fits in [line(), Exec { env: env("HOME", FOLDER), ..line() }] {
            assert!(park.expected(&fits).is_some_and(|(_, expected)| Arc::ptr_eq(&expected, &origin)), "{fits:?}");
        }
        park.lock().generation += 1;
        assert!(park.expected(&line()).is_none(), "it is discarded when it has started");
    }

    #[test]
    fn the_images_environment_is_learnt_once_and_from_commands_that_a_shell_may_wait_for() {
        let park = Park::default();
        let image = |exec: Exec| Exec { image_env: BTreeMap::from([("A".to_owned(), "b".to_owned())]), ..exec };
        assert!(!park.learns(&line()), "there is none");
        assert!(!park.learns(&image(Exec { stdin: true, ..line() })), "no shell waits for that one");
        assert!(park.learns(&image(line())));
        assert!(!park.learns(&image(line())) && park.image_env() == image(line()).image_env);
    }

    #[test]
    fn one_command_waits_for_the_shell_that_starts_and_no_other() {
        let (park, origin) = (Park::default(), origin());
        let generation = starting(&park, &origin);
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| park.take(&origin).is_some());
            while park.expected(&line()).is_some() && !waits.is_finished() {
                std::thread::yield_now();
            }
            assert!(park.take(&origin).is_none(), "another waits");
            park.put(Attempt::Failed, generation);
            assert!(!waits.join().unwrap());
        });
    }

    #[test]
    fn a_shell_is_started_when_no_command_runs() {
        let (park, origin) = (Park::default(), origin());
        let generation = park.next_turn();
        let running = [park.begins(), park.begins()];
        assert!(!park.starts(&origin, generation), "a command came first");
        for one in running {
            assert!(!park.lock().is_due());
            drop(one);
        }
        assert!(park.lock().is_due());
        starting(&park, &origin);
    }
}
