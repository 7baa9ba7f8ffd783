//! What the monitor's threads share: where the guest is, and who waits for what.

use std::{
    fs::File,
    io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{
        Condvar, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard, TryLockError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::unistd::Pid;
use tiffin_types::{
    network::EgressPolicy,
    vm::{EndReason, EndReport},
};

use super::{
    Host,
    launch::{LAUNCHER_LOG, Launch, LogKeep, Phase, SCRATCH},
    log::Log,
    machine::Running,
    output::Output,
    pause::Held,
    rest::Rest,
    words::Words,
};
use crate::{
    LogKind,
    gvisor::Paths,
    host::{
        cgroup::{Cgroups, Group},
        denied::Counts,
        network::{Uplink, has_ipv6},
    },
    qemu::qmp::Qmp,
};

/// Between two attempts to get a lock.
const RETRY: Duration = Duration::from_millis(2);

/// The VM, as its monitor knows it.
pub(super) struct Vm {
    pub(super) folder: PathBuf,
    pub(super) launch: Launch,
    pub(super) host_namespace: File,
    pub(super) host_namespace_id: (u64, u64),
    pub(super) host_addresses: Vec<IpAddr>,
    pub(super) group: Group,
    /// Whether the host has IPv6; asked before the answer is hidden.
    pub(super) ipv6: bool,
    /// The kernel's count of memory kills when the group was made: one that outlived its last run has counted before.
    oom_kills_before: AtomicU64,
    pub(super) engine_log: Log,
    pub(super) console: Log,
    /// What a machine said there last.
    pub(super) words: Words,
    pub(super) errors: Log,
    /// What the program prints.
    pub(super) output: Output,
    pub(super) denied: Mutex<Counts>,
    /// What the guest may reach at the moment.
    reach: Mutex<Reach>,
    /// The guest doesn't know yet what has changed of its network.
    owes_news: AtomicBool,
    /// Names are served from the first time that something is allowed.
    pub(super) resolver: OnceLock<()>,
    /// The sandbox's process, once it runs.
    pub(super) sandbox: OnceLock<Pid>,
    /// The way to a machine's QEMU, once it greeted.
    pub(super) qmp: Mutex<Option<Qmp>>,
    /// A machine's memory, once it runs.
    pub(super) machine: OnceLock<Running>,
    /// How exact the sandbox's timers are.
    pub(super) rest: Rest,
    /// By what a paused guest stands still.
    held: Mutex<Option<Held>>,
    /// Held by whoever pauses, resumes, saves or changes the guest's network: one at a time.
    pub(super) tools: Mutex<()>,
    /// Held while a connection into the guest is made (read), and while there must be none (write).
    pub(super) dials: RwLock<()>,
    /// Somebody asked for the end: whatever ends the guest from now on was asked for.
    stop_requested: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
    /// Threads that read what the guest says, until its last word.
    listeners: Mutex<Vec<JoinHandle<()>>>,
}

/// What a guest may reach, and by what.
#[derive(Debug, Clone)]
pub(super) struct Reach {
    /// The policy.
    pub(super) egress: EgressPolicy,
    /// The link to the host, when something is allowed.
    pub(super) uplink: Option<Uplink>,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    /// The agent of a guest that isn't named yet is ready.
    booted: bool,
    /// Why the monitor itself decided to end the guest.
    verdict: Option<EndReport>,
    report: Option<EndReport>,
    /// How the guest's program ended, as the agent says.
    exit: Option<EndReport>,
    /// Connections that still have to be told of the end.
    waiting: usize,
}

impl Vm {
    pub(super) fn new(folder: PathBuf, launch: Launch, host: Host) -> io::Result<Self> {
        let log = |kind| Log::new(&folder, kind);
        Ok(Self {
            group: Cgroups::detect()?.group(&launch.spec.id),
            ipv6: has_ipv6(),
            oom_kills_before: AtomicU64::new(0),
            reach: Mutex::new(Reach { egress: launch.spec.egress.clone(), uplink: launch.uplink }),
            owes_news: AtomicBool::new(false),
            resolver: OnceLock::new(),
            sandbox: OnceLock::new(),
            qmp: Mutex::default(),
            machine: OnceLock::new(),
            rest: Rest::default(),
            held: Mutex::default(),
            tools: Mutex::default(),
            dials: RwLock::default(),
            engine_log: log(LogKind::Engine),
            console: log(LogKind::Console),
            words: Words::default(),
            errors: log(LogKind::EngineErrors),
            output: Output::new(launch.log.clone().unwrap_or_else(|| LogKeep::beside(&folder))),
            folder,
            launch,
            host_namespace: host.namespace,
            host_namespace_id: host.namespace_id,
            host_addresses: host.addresses,
            denied: Mutex::new(Counts::default()),
            stop_requested: AtomicBool::new(false),
            state: Mutex::new(State {
                phase: Phase::Starting,
                booted: false,
                verdict: None,
                report: None,
                exit: None,
                waiting: 0,
            }),
            changed: Condvar::new(),
            listeners: Mutex::default(),
        })
    }

    /// A path in the folder that only the monitor's mount namespace shows.
    pub(super) fn scratch(&self, name: &str) -> PathBuf {
        self.folder.join(SCRATCH).join(name)
    }

    pub(super) fn with_paths<T>(&self, f: impl FnOnce(&Paths) -> T) -> T {
        let (state, bundle, log) = (self.scratch("runsc"), self.scratch("bundle"), self.scratch(LAUNCHER_LOG));
        f(&Paths { runsc: Path::new(&self.launch.runsc), state: &state, bundle: &bundle, log: &log })
    }

    /// Starts a thread that reads one of the guest's pipes to its end.
    pub(super) fn add_listener(&self, name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let thread = thread::Builder::new().name(name.into()).stack_size(256 * 1024).spawn(work)?;
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        Ok(())
    }

    /// Waits until everything that the guest said has been read. Only once every process is gone: the pipes end with
    /// their last holder.
    pub(super) fn hear_out(&self) {
        let listeners = std::mem::take(&mut *self.listeners.lock().unwrap_or_else(PoisonError::into_inner));
        for listener in listeners {
            let _ = listener.join();
        }
    }

    pub(super) fn reach(&self) -> Reach {
        self.reach.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_reach(&self, reach: Reach) {
        *self.reach.lock().unwrap_or_else(PoisonError::into_inner) = reach;
    }

    pub(super) fn uplink(&self) -> Option<Uplink> {
        self.reach().uplink
    }

    pub(super) fn owes_news(&self) -> bool {
        self.owes_news.load(Ordering::SeqCst)
    }

    pub(super) fn owe_news(&self, owes: bool) {
        self.owes_news.store(owes, Ordering::SeqCst);
    }

    pub(super) fn held(&self) -> Option<Held> {
        *self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_held(&self, held: Option<Held>) {
        *self.held.lock().unwrap_or_else(PoisonError::into_inner) = held;
    }

    pub(super) fn phase(&self) -> Phase {
        self.lock().phase
    }

    /// The agent is ready. Only the first time counts: a guest may say it again whenever it likes. One that is nobody yet has to
    /// be [`named`](Vm::named) as well.
    pub(super) fn ready(&self) {
        match self.launch.template {
            None => self.named(),
            Some(_) => {
                self.lock().booted = true;
                self.changed.notify_all();
            }
        }
    }

    /// The guest knows who it is: it is up.
    pub(super) fn named(&self) {
        if self.phase() == Phase::Starting {
            self.set_phase(Phase::Running);
        }
    }

    /// Whether the agent of a guest that is nobody yet is ready by the deadline.
    pub(super) fn wait_booted(&self, deadline: Instant) -> bool {
        let looked = self.wait(Some(deadline), |state| state.booted || state.phase == Phase::Ended);
        looked.is_some_and(|state| state.booted && state.phase == Phase::Starting)
    }

    /// The right to pause, resume, save or change, or `None` when another has it until the deadline.
    pub(super) fn tools_until(&self, deadline: Instant) -> Option<MutexGuard<'_, ()>> {
        until(deadline, || match self.tools.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        })
    }

    /// The right to connect into the guest, or `None` when there must be no connection until the deadline.
    pub(super) fn dials_until(&self, deadline: Instant) -> Option<RwLockReadGuard<'_, ()>> {
        until(deadline, || match self.dials.try_read() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        })
    }

    /// Remembers the kernel's count of memory kills.
    pub(super) fn note_oom_kills(&self) {
        self.oom_kills_before.store(self.group.oom_kills(), Ordering::SeqCst);
    }

    /// Whether the kernel has killed something of this run for want of memory.
    pub(super) fn is_oom(&self) -> bool {
        self.group.oom_kills() > self.oom_kills_before.load(Ordering::SeqCst)
    }

    /// Moves on, unless the end has come.
    pub(super) fn set_phase(&self, phase: Phase) {
        let mut state = self.lock();
        if state.phase != Phase::Ended {
            state.phase = phase;
            self.changed.notify_all();
        }
    }

    /// Waits until the phase is no longer `phase`; gives the new one, or `None` at the deadline.
    pub(super) fn wait_while(&self, phase: Phase, deadline: Option<Instant>) -> Option<Phase> {
        self.wait(deadline, |state| state.phase != phase).map(|state| state.phase)
    }

    /// The monitor doesn't end before this is dropped (or a second has passed): hold it until the end is passed on.
    pub(super) fn waiter(&self) -> Waiter<'_> {
        self.lock().waiting += 1;
        Waiter { vm: self }
    }

    /// The end, for everyone to see; returns when all who waited have passed it on, or soon.
    pub(super) fn publish_end(&self, report: EndReport) {
        let deadline = Instant::now() + Duration::from_secs(1);
        {
            let mut state = self.lock();
            state.phase = Phase::Ended;
            state.report = Some(report);
        }
        self.changed.notify_all();
        self.wait(Some(deadline), |state| state.waiting == 0);
    }

    pub(super) fn request_stop(&self) {
        self.stop_requested.store(true, Ordering::SeqCst);
    }

    pub(super) fn stop_requested(&self) -> bool {
        self.stop_requested.load(Ordering::SeqCst)
    }

    /// The monitor's own decision to end the guest; the first one counts.
    pub(super) fn decide_end(&self, reason: EndReason, message: impl Into<String>) {
        self.decide(EndReport { reason, message: message.into(), exit_code: None });
    }

    /// As [`Vm::decide_end`], with all that is to be reported.
    pub(super) fn decide(&self, report: EndReport) {
        self.lock().verdict.get_or_insert(report);
        self.kill_all();
    }

    pub(super) fn verdict(&self) -> Option<EndReport> {
        self.lock().verdict.clone()
    }

    /// The program ended; the first word counts.
    ///
    /// Whether this was it.
    pub(super) fn note_exit(&self, report: EndReport) -> bool {
        let mut state = self.lock();
        let first = state.exit.is_none();
        state.exit.get_or_insert(report);
        first
    }

    /// Whether the guest is down by the deadline.
    pub(super) fn wait_for_end(&self, deadline: Instant) -> bool {
        self.wait(Some(deadline), |state| state.report.is_some()).is_some()
    }

    /// How the program ended, if it has.
    pub(super) fn exit(&self) -> Option<EndReport> {
        self.lock().exit.clone()
    }

    /// Kills everything in the VM's PID namespace but the monitor, which is its PID 1.
    pub(super) fn kill_all(&self) {
        assert_eq!(std::process::id(), 1, "kill(-1) outside the VM's own PID namespace");
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(-1), nix::sys::signal::Signal::SIGKILL);
    }

    fn wait(&self, deadline: Option<Instant>, done: impl Fn(&State) -> bool) -> Option<MutexGuard<'_, State>> {
        let mut state = self.lock();
        while !done(&state) {
            state = match deadline {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return None;
                    }
                    self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        Some(state)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic while holding it leaves plain values, which are still right.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tries until it works, or the deadline has come: the standard library's locks have no time limit.
fn until<T>(deadline: Instant, mut attempt: impl FnMut() -> Option<T>) -> Option<T> {
    loop {
        let got = attempt();
        if got.is_some() || Instant::now() >= deadline {
            return got;
        }
        thread::sleep(RETRY);
    }
}

/// Somebody who waits for the end.
pub(super) struct Waiter<'a> {
    vm: &'a Vm,
}

impl Waiter<'_> {
    /// The end, or `None` at the deadline.
    pub(super) fn wait(&self, deadline: Option<Instant>) -> Option<EndReport> {
        self.vm.wait(deadline, |state| state.report.is_some())?.report.clone()
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.vm.lock().waiting -= 1;
        self.vm.changed.notify_all();
    }
}
