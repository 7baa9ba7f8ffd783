//! Where a process runs that may be the guest's: a root of its own with nothing in it but what it was given to read, a user
//! that owns nothing, and namespaces in which there is nobody else.

use std::{
    fs, io,
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command},
    thread,
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    unistd::pivot_root,
};
use tiffin_types::id::VmId;

use super::machine::lend;
use crate::host::cgroup::Door;

/// Users of machines are from here on: beyond what systems and containers give out (systemd's uids end at 0x6FFF_FFFF).
const FIRST_USER: u32 = 0x7000_0000;
/// Above every descriptor that a process is given.
const SPARE: RawFd = 100;

/// What is shown, and to whom.
pub(super) struct Jail<'a> {
    /// An empty folder.
    pub(super) root: &'a Path,
    /// Folders and files of the host, and what they are called inside; read-only.
    pub(super) shown: Vec<(PathBuf, PathBuf)>,
    /// Devices, by the names that they have outside.
    pub(super) devices: Vec<PathBuf>,
    /// User and group.
    pub(super) user: u32,
    /// Where what it opens for reading and writing is handed in ([`lend`](super::machine::lend)).
    pub(super) desk: OwnedFd,
}

/// The VM's own user: the same at each start, and hardly any other's. Two that share one are still apart by their
/// namespaces.
pub(super) fn user_of(id: &VmId) -> u32 {
    // 28 bits of a random id: the highest user then is 0x7FFF_FFFF, which all kernels and file systems can take.
    FIRST_USER + u32::from_str_radix(&id.hex()[..7], 16).unwrap_or(0)
}

impl Jail<'_> {
    /// Starts `command` in the jail, in the control groups behind `door`. It has standard input, output and error as the
    /// command says, and `given` from descriptor 3 on. It is process 1 of its namespace.
    pub(super) fn spawn(&self, mut command: Command, door: Door, given: Vec<OwnedFd>) -> io::Result<Child> {
        let (user, desk) = (self.user, self.desk.as_raw_fd());
        let descriptors: Vec<RawFd> = given.iter().map(AsRawFd::as_raw_fd).collect();
        // SAFETY: only async-signal-safe system calls and writes to memory that is there, on descriptors that are open
        // in the parent until the spawn has returned.
        unsafe {
            command.pre_exec(move || {
                door.enter()?;
                become_user(user)?;
                lend::hand_in(desk)?;
                hand_over(&descriptors)
            });
        }
        // The namespaces are the thread's, and end with it but for what it started.
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                self.enter()?;
                command.spawn()
            });
            inside.join().unwrap_or_else(|_| Err(io::Error::other("the jail's thread panicked")))
        })
    }

    fn enter(&self) -> io::Result<()> {
        unshare(
            CloneFlags::CLONE_NEWNS
                | CloneFlags::CLONE_NEWPID
                | CloneFlags::CLONE_NEWNET
                | CloneFlags::CLONE_NEWIPC
                | CloneFlags::CLONE_NEWUTS,
        )?;
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none)?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some("jail"), self.root, Some("tmpfs"), flags, Some("mode=755,size=64k"))?;
        for (outside, inside) in &self.shown {
            self.show(outside, inside, flags | MsFlags::MS_RDONLY)?;
        }
        for device in &self.devices {
            self.show(device, device, MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC)?;
        }
        mount(none, self.root, none, MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | flags, none)?;
        std::env::set_current_dir("/")?;
        // The old root is put over the new one, and taken off.
        nix::unistd::chdir(self.root)?;
        pivot_root(".", ".")?;
        umount2(".", MntFlags::MNT_DETACH)?;
        nix::unistd::chdir("/")?;
        Ok(())
    }

    fn show(&self, outside: &Path, inside: &Path, flags: MsFlags) -> io::Result<()> {
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", outside.display()));
        let at = self.root.join(inside.strip_prefix("/").unwrap_or(inside));
        if let Ok(target) = fs::read_link(outside) {
            // Of a system whose /lib is /usr/lib.
            return std::os::unix::fs::symlink(target, &at).map_err(named);
        }
        let Ok(metadata) = fs::metadata(outside) else { return Ok(()) };
        if metadata.is_dir() {
            fs::create_dir_all(&at).map_err(named)?;
        } else {
            fs::create_dir_all(at.parent().unwrap_or(self.root)).map_err(named)?;
            fs::File::create(&at).map_err(named)?;
        }
        let none = None::<&str>;
        let bind = || {
            mount(Some(outside), &at, none, MsFlags::MS_BIND, none)?;
            mount(none, &at, none, MsFlags::MS_BIND | MsFlags::MS_REMOUNT | flags, none)
        };
        bind().map_err(|error| named(error.into()))
    }
}

/// Puts the descriptors at 3 and on, and lets nothing else that is open pass.
fn hand_over(descriptors: &[RawFd]) -> io::Result<()> {
    let checked = |result: libc::c_int| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) };
    let mut spare = [0; 8];
    for (kept, descriptor) in spare.iter_mut().zip(descriptors) {
        // SAFETY: fcntl(2) on an open descriptor.
        *kept = checked(unsafe { libc::fcntl(*descriptor, libc::F_DUPFD_CLOEXEC, SPARE) })?;
    }
    for (place, kept) in (3..).zip(&spare[..descriptors.len().min(spare.len())]) {
        // SAFETY: dup2(2) onto a descriptor that nothing in this process will use again.
        checked(unsafe { libc::dup2(*kept, place) })?;
    }
    let first = 3 + descriptors.len() as libc::c_uint;
    // SAFETY: marks descriptors only; the exec closes them.
    let marked = unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    // A kernel without it has what the standard library marked.
    if marked != 0 && io::Error::last_os_error().raw_os_error() != Some(libc::EINVAL) {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn become_user(user: u32) -> io::Result<()> {
    // SAFETY: system calls on numbers, of a process with one thread.
    let done = unsafe {
        libc::setgroups(0, std::ptr::null()) == 0
            && libc::setresgid(user, user, user) == 0
            && libc::setresuid(user, user, user) == 0
            && libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) == 0
    };
    if done { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_beyond_every_systems() {
        for _ in 0..100 {
            let user = user_of(&VmId::random());
            assert!((FIRST_USER..=0x7FFF_FFFF).contains(&user), "{user}");
        }
    }
}
