//! Starting a process: `vfork` in all but name.
//!
//! The child is made with `CLONE_VM | CLONE_VFORK` on a stack of its own: nothing is copied, and this thread stands still
//! until the child has become the program or given up. Between the two, `child_main` shares the agent's memory, so it
//! only makes system calls: no allocation, no lock, no panic; and it becomes the command's user as its last step. A
//! process of that user still can't look into it, since the agent isn't dumpable.
//!
//! What all commands share (limits, umask, processors, no supplementary groups) the agent has set for itself at boot.

use std::ffi::{CString, c_char, c_int, c_void};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::atomic::{AtomicI32, Ordering};

use nix::errno::Errno;

use super::parked::DESCRIPTOR;
use super::streams::ChildEnds;
use crate::reaper::Child;

/// The child's stack, in bytes. It calls a handful of thin wrappers only.
const STACK: usize = 32 * 1024;

/// What to start.
#[derive(Debug)]
pub struct Plan<'a> {
    /// Paths to try.
    pub candidates: Vec<CString>,
    /// `argv`.
    pub arguments: Vec<CString>,
    /// `NAME=value`.
    pub environment: Vec<CString>,
    /// Working directory.
    pub cwd: CString,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Supplementary groups; the agent itself has none.
    pub supplementary: Vec<u32>,
    /// Its streams.
    pub streams: &'a ChildEnds,
    /// What becomes [`parked::DESCRIPTOR`](super::parked::DESCRIPTOR).
    pub control: Option<&'a OwnedFd>,
    /// Where to write `0` to enter the command's groups.
    pub groups: [Option<RawFd>; 2],
    /// Whether it has its memory at the same addresses as every such process: an emulator translates its code anew else.
    pub same_addresses: bool,
}

/// Why nothing was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SpawnError {
    /// No process or memory left.
    #[error("no room: {0}")]
    NoRoom(Errno),
    /// The working directory can't be entered.
    #[error("working directory: {0}")]
    Cwd(Errno),
    /// The program is missing or can't be run.
    #[error("program: {0}")]
    Program(Errno),
    /// Anything else.
    #[error("set-up: {0}")]
    Setup(Errno),
}

const STARTED: c_int = 0;
const AT_SETUP: c_int = 1;
const AT_CWD: c_int = 2;
const AT_PROGRAM: c_int = 3;

/// What the child works from: pointers into a [`Plan`], and where it got to.
struct Orders {
    candidates: Vec<*const c_char>,
    arguments: Vec<*const c_char>,
    environment: Vec<*const c_char>,
    cwd: *const c_char,
    uid: u32,
    gid: u32,
    supplementary: Vec<u32>,
    stdio: [Option<RawFd>; 3],
    terminal: bool,
    control: Option<RawFd>,
    groups: [Option<RawFd>; 2],
    same_addresses: bool,
    failed_at: AtomicI32,
    errno: AtomicI32,
}

/// Starts `plan` as `child`, and returns when it runs.
///
/// # Errors
/// [`SpawnError`]; nothing runs then.
pub fn spawn(plan: &Plan<'_>, child: &Child) -> Result<(), SpawnError> {
    let orders = Orders {
        candidates: pointers(&plan.candidates),
        arguments: pointers(&plan.arguments),
        environment: pointers(&plan.environment),
        cwd: plan.cwd.as_ptr(),
        uid: plan.uid,
        gid: plan.gid,
        supplementary: plan.supplementary.clone(),
        stdio: plan.streams.stdio(),
        terminal: matches!(plan.streams, ChildEnds::Terminal(_)),
        control: plan.control.map(AsRawFd::as_raw_fd),
        groups: plan.groups,
        same_addresses: plan.same_addresses,
        failed_at: AtomicI32::new(STARTED),
        errno: AtomicI32::new(0),
    };
    let mut stack: Vec<u128> = Vec::with_capacity(STACK / size_of::<u128>());
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PARENT_SETTID | libc::SIGCHLD;
    // SAFETY: `stack` and `orders` outlive the child's use of them, since CLONE_VFORK holds this thread until the child
    // has left this memory; the stack's top is aligned; the kernel writes the pid into memory that `child` keeps alive.
    let pid = unsafe {
        let top = stack.as_mut_ptr().add(stack.capacity()).cast::<c_void>();
        libc::clone(child_main, top, flags, ptr::from_ref(&orders).cast_mut().cast::<c_void>(), child.pid_slot())
    };
    if pid < 0 {
        return Err(SpawnError::NoRoom(Errno::last()));
    }
    child.forked();
    let errno = Errno::from_raw(orders.errno.load(Ordering::Acquire));
    match orders.failed_at.load(Ordering::Acquire) {
        STARTED => Ok(()),
        _ if matches!(errno, Errno::EAGAIN | Errno::ENOMEM) => Err(SpawnError::NoRoom(errno)),
        AT_CWD => Err(SpawnError::Cwd(errno)),
        AT_PROGRAM => Err(SpawnError::Program(errno)),
        _ => Err(SpawnError::Setup(errno)),
    }
}

/// Null-terminated, as the kernel wants it.
fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).chain([ptr::null()]).collect()
}

/// The child's life up to the program. Runs in the agent's memory: system calls only.
extern "C" fn child_main(orders: *mut c_void) -> c_int {
    // SAFETY: `spawn` passes its `Orders`, and waits.
    let orders = unsafe { &*orders.cast_const().cast::<Orders>() };
    // SAFETY: only system calls on values that `spawn` keeps alive.
    let failed_at = unsafe { become_program(orders) };
    orders.errno.store(Errno::last_raw(), Ordering::Release);
    orders.failed_at.store(failed_at, Ordering::Release);
    // SAFETY: leaves without running anything of the parent's.
    unsafe { libc::_exit(127) }
}

/// Returns only on failure: where, with `errno` set.
///
/// # Safety
/// For a fresh process whose parent waits and keeps all that `orders` points to alive.
unsafe fn become_program(orders: &Orders) -> c_int {
    // SAFETY: see above; every pointer is null-terminated or sized.
    unsafe {
        for group in orders.groups.iter().flatten() {
            if libc::write(*group, c"0".as_ptr().cast(), 1) != 1 {
                return AT_SETUP;
            }
        }
        if libc::setsid() < 0 {
            return AT_SETUP;
        }
        for (target, source) in (0..).zip(orders.stdio) {
            if source.is_some_and(|source| libc::dup2(source, target) < 0) {
                return AT_SETUP;
            }
        }
        if orders.control.is_some_and(|control| give(control, DESCRIPTOR) < 0) {
            return AT_SETUP;
        }
        if orders.terminal && libc::ioctl(0, libc::TIOCSCTTY, 0) != 0 {
            return AT_SETUP;
        }
        if libc::chdir(orders.cwd) != 0 {
            return AT_CWD;
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        let groups = &orders.supplementary;
        // The raw calls: the C library's would change every thread of the agent.
        if libc::sigprocmask(libc::SIG_SETMASK, &none, ptr::null_mut()) != 0
            || !groups.is_empty() && libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) != 0
            || libc::syscall(libc::SYS_setresgid, orders.gid, orders.gid, orders.gid) != 0
            || libc::syscall(libc::SYS_setresuid, orders.uid, orders.uid, orders.uid) != 0
        {
            return AT_SETUP;
        }
        if orders.same_addresses {
            libc::personality(libc::ADDR_NO_RANDOMIZE as libc::c_ulong);
        }
        execute(orders)
    }
}

/// Has the program inherit `source` as `target`.
///
/// # Safety
/// As [`become_program`].
unsafe fn give(source: RawFd, target: RawFd) -> c_int {
    // SAFETY: both only change this process's descriptors. A copy of a descriptor onto itself would stay closed to the
    // program.
    unsafe { if source == target { libc::fcntl(source, libc::F_SETFD, 0) } else { libc::dup2(source, target) } }
}

/// Tries the candidates as `execvp` does: on to the next while one is missing; a forbidden one is what is told at the end.
///
/// # Safety
/// As [`become_program`].
unsafe fn execute(orders: &Orders) -> c_int {
    let mut told = libc::ENOENT;
    for candidate in orders.candidates.iter().take_while(|candidate| !candidate.is_null()) {
        // SAFETY: all null-terminated.
        unsafe { libc::execve(*candidate, orders.arguments.as_ptr(), orders.environment.as_ptr()) };
        match Errno::last_raw() {
            libc::ENOENT | libc::ENOTDIR => {}
            libc::EACCES => told = libc::EACCES,
            other => {
                told = other;
                break;
            }
        }
    }
    Errno::set_raw(told);
    AT_PROGRAM
}
