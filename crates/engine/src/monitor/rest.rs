//! How exactly the timers of a guest's sandbox fire: to the microsecond while something goes on in it, late by up to
//! [`LAZY_NS`] while nothing does.
//!
//! The engine's systrap platform looks every 400 microseconds whether its ways of switching still are the best, however
//! idle the guest (`controlFastPath` in gVisor's `systrap/metrics.go`; releases of 2026 stop at rest). That takes a
//! twentieth of a processor for each VM, and fifty idle VMs leave nothing of a small host to the others. The kernel puts
//! wake-ups off that may be late (timer slack, prctl(2)), a few hundred a second are left of some thousands. Not while
//! the guest works: the engine's scheduler needs its own timers then.

use std::{
    fs,
    path::Path,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use nix::unistd::Pid;

use super::{launch::Phase, state::Vm};
use crate::host::{flows, network::GUEST_V4, process};

/// How late a timer may be in a guest that rests.
const LAZY_NS: u32 = 10_000_000;
/// What gives a thread back the exactness that it began with (`/proc/PID/timerslack_ns`, proc(5)).
const EXACT: u32 = 0;
/// How long nothing may have been asked of a guest before it rests.
const QUIET: Duration = Duration::from_millis(500);
/// How often it is looked whether a guest that rests has found itself something to do.
const LOOK: Duration = Duration::from_secs(1);
/// So many percent of a processor does a sandbox take that has something to do: at rest it takes one, and wide awake for
/// nothing, five.
const BUSY_PERCENT: u128 = 8;

/// Whether a guest rests, and since when nothing was asked of it.
pub(super) struct Rest {
    state: Mutex<State>,
    attended: Condvar,
}

struct State {
    rests: bool,
    asked: Instant,
}

impl Default for Rest {
    fn default() -> Self {
        Self { state: Mutex::new(State { rests: false, asked: Instant::now() }), attended: Condvar::new() }
    }
}

impl Rest {
    /// Something is about to be asked of the guest.
    pub(super) fn attend(&self, sandbox: Option<&Pid>) {
        let mut state = self.lock();
        state.asked = Instant::now();
        self.wake(&mut state, sandbox);
    }

    fn wake(&self, state: &mut State, sandbox: Option<&Pid>) {
        if state.rests {
            state.rests = false;
            set_slack(sandbox, EXACT);
            self.attended.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lets the guest rest whenever nothing goes on in it, until its end. On a thread whose network namespace is the gateway's.
pub(super) fn keep(vm: &Vm) {
    let Some(sandbox) = vm.sandbox.get() else { return };
    let rest = &vm.rest;
    let mut used = Used::of(*sandbox);
    while vm.phase() != Phase::Ended {
        let mut state = rest.lock();
        let nap = match QUIET.checked_sub(state.asked.elapsed()) {
            _ if state.rests => LOOK,
            Some(left) if !left.is_zero() => left,
            _ => QUIET,
        };
        state = rest.attended.wait_timeout(state, nap).unwrap_or_else(PoisonError::into_inner).0;
        if state.asked.elapsed() < QUIET {
            continue;
        }
        let before = std::mem::replace(&mut used, Used::of(*sandbox));
        let is_busy = used.percent_since(before) >= BUSY_PERCENT;
        if state.rests && is_busy {
            rest.wake(&mut state, Some(sandbox));
        } else if !state.rests && !is_busy && !flows::is_dialled(GUEST_V4) {
            state.rests = true;
            set_slack(Some(sandbox), LAZY_NS);
        }
    }
}

/// For every thread of the sandbox; those that they start later are as they are. A kernel that refuses leaves them exact.
fn set_slack(sandbox: Option<&Pid>, nanoseconds: u32) {
    let Some(sandbox) = sandbox else { return };
    let threads = fs::read_dir(format!("/proc/{sandbox}/task"));
    for thread in threads.into_iter().flatten().flatten() {
        let _ = fs::write(Path::new("/proc").join(thread.file_name()).join("timerslack_ns"), nanoseconds.to_string());
    }
}

/// The processor time that a sandbox had taken at some moment.
#[derive(Clone, Copy)]
struct Used {
    cpu: Duration,
    at: Instant,
}

impl Used {
    fn of(sandbox: Pid) -> Self {
        Self { cpu: process::cpu_time(sandbox.as_raw()).unwrap_or_default(), at: Instant::now() }
    }

    fn percent_since(self, before: Self) -> u128 {
        let elapsed = self.at.duration_since(before.at).as_millis().max(1);
        self.cpu.saturating_sub(before.cpu).as_millis() * 100 / elapsed
    }
}
