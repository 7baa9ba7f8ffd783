//! What a process that reads what strangers made may still do: read open files, write below its folder.
//!
//! The reader has no `unsafe`, so this is the second fence. It bounds memory, time and file size too, which the reader
//! itself can't.

use std::{io, path::Path};

use nix::{
    sched::{CloneFlags, unshare},
    sys::{
        prctl,
        resource::{Resource, setrlimit},
    },
    unistd::{chdir, chroot},
};

/// CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_FSETID and CAP_SETFCAP, of linux/capability.h: what it takes to give
/// files their owners, modes and capabilities.
pub(super) const GIVE_AWAY: u32 = 1 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 31;

/// What a process may still use.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Confinement {
    pub(crate) memory_bytes: u64,
    pub(crate) cpu_seconds: u64,
    /// Bytes of a file.
    pub(crate) file_bytes: u64,
    pub(crate) open_files: u64,
    /// The first 32, as bits.
    pub(crate) capabilities: u32,
}

/// Confines this process, which has one thread, to the folder `root`, for good.
pub(crate) fn confine(root: &Path, bounds: &Confinement) -> io::Result<()> {
    for (resource, limit) in [
        (Resource::RLIMIT_AS, bounds.memory_bytes),
        (Resource::RLIMIT_CPU, bounds.cpu_seconds),
        (Resource::RLIMIT_FSIZE, bounds.file_bytes),
        (Resource::RLIMIT_NOFILE, bounds.open_files),
        (Resource::RLIMIT_CORE, 0),
    ] {
        setrlimit(resource, limit, limit)?;
    }
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS)?;
    chroot(root)?;
    chdir("/")?;
    prctl::set_no_new_privs()?;
    keep_capabilities(bounds.capabilities)
}

fn keep_capabilities(capabilities: u32) -> io::Result<()> {
    /// `struct __user_cap_header_struct`, version 3: two data structs.
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    struct Data {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    let header = Header { version: 0x2008_0522, pid: 0 };
    let low = Data { effective: capabilities, permitted: capabilities, inheritable: 0 };
    let data = [low, Data { effective: 0, permitted: 0, inheritable: 0 }];
    // SAFETY: capset(2) reads one header and, in this version, two data structs, which live through the call.
    match unsafe { nix::libc::syscall(nix::libc::SYS_capset, &raw const header, data.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
