//! What the process that reads a stranger's filesystem may still do: read the open upload, write below its folder.
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

use super::Limits;

/// Memory: names of a million files with several links each, with room to spare.
const MEMORY_BYTES: u64 = 2 << 30;
const OPEN_FILES: u64 = 32;

/// CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_FSETID and CAP_SETFCAP, of linux/capability.h: what it takes to give
/// files their owners, modes and capabilities.
const CAPABILITIES: u32 = 1 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 31;

/// Confines this process, which has one thread, to the folder `root`, for good.
pub(super) fn confine(root: &Path, limits: &Limits) -> io::Result<()> {
    for (resource, limit) in [
        (Resource::RLIMIT_AS, MEMORY_BYTES),
        (Resource::RLIMIT_CPU, limits.time.as_secs().max(1)),
        (Resource::RLIMIT_FSIZE, limits.bytes),
        (Resource::RLIMIT_NOFILE, OPEN_FILES),
        (Resource::RLIMIT_CORE, 0),
    ] {
        setrlimit(resource, limit, limit)?;
    }
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS)?;
    chroot(root)?;
    chdir("/")?;
    prctl::set_no_new_privs()?;
    keep_capabilities()
}

fn keep_capabilities() -> io::Result<()> {
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
    let low = Data { effective: CAPABILITIES, permitted: CAPABILITIES, inheritable: 0 };
    let data = [low, Data { effective: 0, permitted: 0, inheritable: 0 }];
    // SAFETY: capset(2) reads one header and, in this version, two data structs, which live through the call.
    match unsafe { nix::libc::syscall(nix::libc::SYS_capset, &raw const header, data.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
