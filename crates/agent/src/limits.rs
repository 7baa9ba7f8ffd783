//! What the agent limits itself to at boot, so that every command inherits it without a system call of its own.
//!
//! Failures are lines on standard error: a guest without a limit is better than none, and the host enforces the
//! machine's own limits anyway.

use std::io;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::stat::{Mode, umask};
use nix::unistd::Pid;

use crate::init;

/// Descriptors that a command may have open, where the engine doesn't allow less.
const OPEN_FILES: libc::rlim_t = 65_536;

/// The last capability's number, with room for what kernels may add.
const LAST_CAPABILITY: libc::c_ulong = 63;

/// Docker's set by number: CHOWN, DAC_OVERRIDE, FOWNER, FSETID, KILL, SETGID, SETUID, SETPCAP, NET_BIND_SERVICE, NET_RAW,
/// SYS_CHROOT, MKNOD, AUDIT_WRITE, SETFCAP.
const KEPT: [libc::c_ulong; 14] = [0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31];

/// No core files, a bound on open files, no supplementary groups, the usual umask, and `cpus` processors.
pub fn apply(cpus: u32) {
    set(libc::RLIMIT_CORE, 0, "core size");
    set(libc::RLIMIT_NOFILE, OPEN_FILES, "open files");
    if init::is_bare() {
        // A small machine's kernel allows each user fewer than the guest may have.
        set(libc::RLIMIT_NPROC, libc::RLIM_INFINITY, "processes");
    }
    if let Err(error) = bound_capabilities() {
        eprintln!("tiffin-agent: root in the guest keeps the agent's capabilities: {error}");
    }
    if let Err(error) = nix::unistd::setgroups(&[]) {
        eprintln!("tiffin-agent: supplementary groups stay: {error}");
    }
    // One heap for all threads: each connection's own would cost memory that is never given back.
    // SAFETY: takes no pointers.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    umask(Mode::S_IWGRP | Mode::S_IWOTH);
    if let Err(error) = bind_to(cpus) {
        eprintln!("tiffin-agent: not bound to {cpus} processors: {error}");
    }
}

/// Takes from all that the agent starts what would let root in the guest command it, or reach what it doesn't give: of
/// Docker's set what the engine gives is left. The agent keeps its own.
fn bound_capabilities() -> io::Result<()> {
    for capability in (0..=LAST_CAPABILITY).filter(|capability| !KEPT.contains(capability)) {
        // SAFETY: takes no pointers.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } != 0 {
            let error = io::Error::last_os_error();
            // The kernel knows fewer.
            if error.raw_os_error() != Some(libc::EINVAL) {
                return Err(error);
            }
        }
    }
    Ok(())
}

/// At most `max` processes for each user but root: the fallback where the guest has no process groups to count in.
pub fn apply_processes(max: u32) {
    set(libc::RLIMIT_NPROC, max.into(), "processes");
}

/// Sets a limit, or what the agent itself is held to where that is less.
fn set(resource: libc::__rlimit_resource_t, value: libc::rlim_t, name: &str) {
    let mut limit = libc::rlimit { rlim_cur: value, rlim_max: value };
    // SAFETY: `limit` outlives the calls.
    let set = unsafe {
        libc::setrlimit(resource, &limit) == 0 || {
            libc::getrlimit(resource, &mut limit);
            limit.rlim_max = limit.rlim_max.min(value);
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(resource, &limit) == 0
        }
    };
    if !set {
        eprintln!("tiffin-agent: limit of {name} not set: {}", std::io::Error::last_os_error());
    }
}

/// Binds to the first `cpus` of the processors that the guest shows, when it shows more.
fn bind_to(cpus: u32) -> nix::Result<()> {
    let shown = sched_getaffinity(Pid::from_raw(0))?;
    let mut kept = CpuSet::new();
    let mut left = cpus.max(1);
    for cpu in (0..CpuSet::count()).filter(|cpu| shown.is_set(*cpu) == Ok(true)) {
        if left == 0 {
            return sched_setaffinity(Pid::from_raw(0), &kept);
        }
        kept.set(cpu)?;
        left -= 1;
    }
    Ok(())
}
