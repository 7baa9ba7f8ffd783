//! Ending the guest: every process but the agent, in its own time first, then by force.
//!
//! Only ever called by process 1: it signals every process that it can see.

use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;

use crate::init;

/// Everything but the caller and process 1.
const EVERYONE: Pid = Pid::from_raw(-1);

/// How often to look whether all are gone.
const STEP: Duration = Duration::from_millis(2);

/// The longest grace; a request may ask for more, but a shutdown must end.
pub const MAX_GRACE: Duration = Duration::from_secs(600);

/// How long the killed may take to vanish.
const KILL_LIMIT: Duration = Duration::from_secs(3);

/// SIGTERM to all, SIGKILL after `grace` to who is left, then all written data to disk.
pub fn end_guest(grace: Duration) {
    if signal_all(Signal::SIGTERM) {
        // A stopped process takes its SIGTERM only when it goes on.
        signal_all(Signal::SIGCONT);
        if !gone_within(grace.min(MAX_GRACE)) {
            signal_all(Signal::SIGKILL);
            gone_within(KILL_LIMIT);
        }
    }
    nix::unistd::sync();
}

/// Ends the agent, and the guest with it: a kernel without its process 1 doesn't go on, so its machine is switched off.
pub fn leave(code: i32) -> ! {
    if init::is_bare() {
        leave_machine();
    }
    std::process::exit(code)
}

/// Switches the machine off, by a reset that its monitor takes for the end.
pub fn leave_machine() -> ! {
    nix::unistd::sync();
    let Err(error) = reboot(RebootMode::RB_AUTOBOOT);
    eprintln!("tiffin-agent: the machine can't be switched off: {error}");
    std::process::exit(1)
}

/// Whether there was anybody. On a bare kernel there always is: its own threads, which take no signal.
fn signal_all(signal: Signal) -> bool {
    kill(EVERYONE, signal) != Err(Errno::ESRCH)
}

/// Whether no process is left but the kernel's own: all others are process 1's children, or become them when their parent ends.
fn is_alone() -> bool {
    let look = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT | WaitPidFlag::__WALL;
    waitid(Id::All, look) == Err(Errno::ECHILD)
}

fn gone_within(limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    while !is_alone() {
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(STEP);
    }
    true
}
