//! The one thread that waits for processes: the agent's own children, and the orphans that PID 1 inherits.
//!
//! Invariant: no exit is lost between a fork and the moment its pid is known. A [`Child`] is registered before the fork,
//! and the kernel itself writes the pid into it ([`Child::pid_slot`], `CLONE_PARENT_SETTID`) before the new process
//! runs. No lock is held over a fork, so that a slow one delays nobody.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// How often to look for orphans while there is no child to wait for.
const IDLE: Duration = Duration::from_secs(30);

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// The exit code, or 128 + the signal's number.
    pub code: i32,
    /// The signal's number, where one ended it.
    pub signal: Option<i32>,
    /// When it was reaped.
    pub at: Instant,
}

impl Exit {
    fn of(status: libc::c_int) -> Self {
        let signal = (!libc::WIFEXITED(status)).then(|| libc::WTERMSIG(status));
        let code = signal.map_or_else(|| libc::WEXITSTATUS(status), |signal| 128 + signal);
        Exit { code, signal, at: Instant::now() }
    }
}

#[derive(Debug)]
struct Slot {
    /// Zero until the kernel fills it in.
    pid: AtomicI32,
    exit: OnceLock<Exit>,
    hidden: AtomicBool,
    /// An eventfd, readable once `exit` is set.
    wake: OwnedFd,
}

/// Waits for every process.
#[derive(Debug)]
pub struct Reaper {
    slots: Mutex<Vec<Arc<Slot>>>,
    forks: Mutex<u64>,
    forked: Condvar,
}

/// A child that is expected, runs, or has ended. Dropped, its exit is of no more interest.
#[derive(Debug)]
pub struct Child {
    slot: Arc<Slot>,
    reaper: Arc<Reaper>,
}

impl Reaper {
    /// Starts the thread.
    ///
    /// # Errors
    /// When there is no room for a thread.
    pub fn start() -> io::Result<Arc<Self>> {
        let reaper = Arc::new(Reaper { slots: Mutex::new(Vec::new()), forks: Mutex::new(0), forked: Condvar::new() });
        let worker = Arc::clone(&reaper);
        std::thread::Builder::new()
            .name("reaper".to_owned())
            .stack_size(crate::listen::STACK)
            .spawn(move || worker.reap_forever())?;
        Ok(reaper)
    }

    /// Registers a child that is about to be forked.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn expect(self: &Arc<Self>) -> io::Result<Child> {
        // SAFETY: takes no pointers.
        let wake = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if wake < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: eventfd just made this descriptor; nothing else owns it.
        let wake = unsafe { OwnedFd::from_raw_fd(wake) };
        let slot =
            Arc::new(Slot { pid: AtomicI32::new(0), exit: OnceLock::new(), hidden: AtomicBool::new(false), wake });
        lock(&self.slots).push(Arc::clone(&slot));
        Ok(Child { slot, reaper: Arc::clone(self) })
    }

    /// The pids of the children that run and are hidden.
    pub fn hidden(&self) -> Vec<libc::pid_t> {
        let slots = lock(&self.slots);
        let hidden = slots.iter().filter(|slot| slot.hidden.load(Ordering::Relaxed) && slot.exit.get().is_none());
        hidden.map(|slot| slot.pid.load(Ordering::Acquire)).filter(|pid| *pid != 0).collect()
    }

    fn reap_forever(&self) {
        loop {
            let forks_before = *lock(&self.forks);
            let mut status = 0;
            // SAFETY: `status` outlives the call.
            let pid = unsafe { libc::waitpid(-1, &mut status, 0) };
            if pid > 0 {
                self.deliver(pid, Exit::of(status));
            } else if io::Error::last_os_error().raw_os_error() == Some(libc::ECHILD) {
                let forks = lock(&self.forks);
                drop(self.forked.wait_timeout_while(forks, IDLE, |forks| *forks == forks_before));
            }
        }
    }

    fn deliver(&self, pid: libc::pid_t, exit: Exit) {
        let slots = lock(&self.slots);
        let ended = slots.iter().find(|slot| slot.pid.load(Ordering::Acquire) == pid && slot.exit.get().is_none());
        if let Some(slot) = ended
            && slot.exit.set(exit).is_ok()
        {
            // An eventfd at zero always takes a one, so this can't fail.
            let _ = nix::unistd::write(&slot.wake, &1u64.to_ne_bytes());
        }
    }
}

impl Child {
    /// Where the fork must have the kernel write the pid.
    pub fn pid_slot(&self) -> *mut libc::pid_t {
        self.slot.pid.as_ptr()
    }

    /// To be called after the fork.
    pub fn forked(&self) {
        *lock(&self.reaper.forks) += 1;
        self.reaper.forked.notify_all();
    }

    /// Its pid, once forked. Only while [`Child::exit`] is none does it surely mean this child.
    pub fn pid(&self) -> libc::pid_t {
        self.slot.pid.load(Ordering::Acquire)
    }

    /// Whether it is the agent's own and none of the guest's.
    pub fn hide(&self, hidden: bool) {
        self.slot.hidden.store(hidden, Ordering::Relaxed);
    }

    /// How it ended, if it has.
    pub fn exit(&self) -> Option<Exit> {
        self.slot.exit.get().copied()
    }

    /// Readable once it has ended.
    pub fn wake(&self) -> BorrowedFd<'_> {
        self.slot.wake.as_fd()
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        lock(&self.reaper.slots).retain(|slot| !Arc::ptr_eq(slot, &self.slot));
    }
}

/// A poisoned lock would mean a panic, which ends the agent anyway; the data behind it is always whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
