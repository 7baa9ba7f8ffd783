//! Lending a file to a process that opens it by a name: QEMU, and the file of its guest's memory.
//!
//! QEMU opens that for reading and writing, also where it maps it for itself alone. A memory that many guests go on from must
//! not be writable by any of them. So the name leads nowhere: an attempt to open something for reading and writing is handed
//! to the monitor by the kernel (seccomp_unotify(2)), which has its own descriptor put into the process instead, one that
//! can only be read where that is enough. Attempts to open something else go on as if nobody had looked. Nothing here keeps
//! the process from anything; its jail does.

use std::{
    fs::File,
    io,
    mem::{offset_of, size_of, zeroed},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd, RawFd},
        unix::fs::FileExt,
    },
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// How often it is looked whether the file may still be asked for, in milliseconds.
const LOOK_MS: u16 = 200;

/// A statement of the filter's: 32 bits of the call's data, or what is to be done.
const fn stmt(code: u32, value: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt: 0, jf: 0, k: value }
}

/// Goes on where the value is equal; skips `others` statements where it isn't.
const fn unless(value: u32, others: u8) -> libc::sock_filter {
    libc::sock_filter { code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16, jt: 0, jf: others, k: value }
}

/// Puts the calling process's calls of openat(2) for reading and writing at the disposal of whoever gets the descriptor that is
/// sent through `to`. For a process that is about to be another program: makes system calls only.
///
/// # Errors
/// The kernel's.
pub(in crate::monitor) fn hand_in(to: RawFd) -> io::Result<()> {
    const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
    let flags = offset_of!(libc::seccomp_data, args) + 2 * size_of::<u64>();
    let filter = [
        stmt(LOAD, offset_of!(libc::seccomp_data, nr) as u32),
        unless(libc::SYS_openat as u32, 4),
        stmt(LOAD, flags as u32),
        stmt(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, libc::O_ACCMODE as u32),
        unless(libc::O_RDWR as u32, 1),
        stmt(RETURN, libc::SECCOMP_RET_USER_NOTIF),
        stmt(RETURN, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
    // SAFETY: seccomp(2) reads a program of that length, which is there until it returns.
    let listener = unsafe {
        let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER;
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program)
    };
    if listener < 0 {
        return Err(io::Error::last_os_error());
    }
    send(to, listener as RawFd)
}

/// One descriptor, beside one byte. Not nix's, which asks for memory.
fn send(to: RawFd, descriptor: RawFd) -> io::Result<()> {
    #[repr(C)]
    struct Control {
        header: libc::cmsghdr,
        descriptor: RawFd,
    }
    // SAFETY: all zero is a valid header of either kind; lengths and pointers are of what stands on this stack.
    let sent = unsafe {
        let mut control: Control = zeroed();
        control.header.cmsg_len = libc::CMSG_LEN(size_of::<RawFd>() as u32) as _;
        control.header.cmsg_level = libc::SOL_SOCKET;
        control.header.cmsg_type = libc::SCM_RIGHTS;
        control.descriptor = descriptor;
        let mut byte = 0u8;
        let mut part = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
        let mut message: libc::msghdr = zeroed();
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = (&raw mut control).cast();
        message.msg_controllen = size_of::<Control>() as _;
        libc::sendmsg(to, &raw const message, libc::MSG_NOSIGNAL)
    };
    if sent == 1 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Lends `file` to whoever opens `name`, while `wanted` and the process is there. After that, nothing can be opened for
/// reading and writing any more.
pub(in crate::monitor) fn lend(listener: &OwnedFd, name: &str, file: &File, wanted: impl Fn() -> bool) {
    while wanted() {
        let mut looked = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        match poll(&mut looked, PollTimeout::from(LOOK_MS)) {
            Ok(0) | Err(nix::errno::Errno::EINTR) => {}
            Ok(_) if looked[0].revents().is_some_and(|events| events.contains(PollFlags::POLLIN)) => {
                match answer_next(listener, name, file) {
                    // Whoever tried is gone.
                    Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                    Err(_) => return,
                    Ok(()) => {}
                }
            }
            // Nobody is left whom the filter is for.
            Ok(_) | Err(_) => return,
        }
    }
}

/// Answers the next attempt.
fn answer_next(listener: &OwnedFd, name: &str, file: &File) -> io::Result<()> {
    // SAFETY: all zero is what the kernel wants to be given.
    let mut attempt: libc::seccomp_notif = unsafe { zeroed() };
    // SAFETY: the request takes that structure, which is there for the duration of the call.
    if unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut attempt) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let answered = if is_of(&attempt, name) {
        let lent = libc::seccomp_notif_addfd {
            id: attempt.id,
            flags: libc::SECCOMP_ADDFD_FLAG_SEND as u32,
            srcfd: file.as_raw_fd() as u32,
            newfd: 0,
            newfd_flags: libc::O_CLOEXEC as u32,
        };
        // SAFETY: as above.
        unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_ADDFD, &raw const lent) }
    } else {
        let go_on = libc::seccomp_notif_resp {
            id: attempt.id,
            val: 0,
            error: 0,
            flags: libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
        };
        // SAFETY: as above.
        unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, &raw const go_on) }
    };
    if answered < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Whether the attempt is of that name.
fn is_of(attempt: &libc::seccomp_notif, name: &str) -> bool {
    let mut said = vec![0; name.len() + 1];
    let memory = File::open(format!("/proc/{}/mem", attempt.pid));
    let read = memory.and_then(|memory| memory.read_exact_at(&mut said, attempt.data.args[1]));
    read.is_ok() && said.strip_suffix(&[0]) == Some(name.as_bytes())
}

/// The descriptor that a process sent by [`hand_in`].
///
/// # Errors
/// When it sent none.
pub(in crate::monitor) fn take(from: RawFd) -> io::Result<OwnedFd> {
    crate::host::descriptors::receive(from)?.1.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Seek, Write},
        os::unix::{net::UnixStream, process::CommandExt},
        process::{Command, Stdio},
        sync::atomic::{AtomicBool, Ordering},
        thread,
    };

    use super::*;

    /// What a shell says that opens names of its own for reading and writing while `file` is lent as `/lent/here`.
    fn said(script: &str, file: &File) -> String {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let to = theirs.as_raw_fd();
        let mut command = Command::new("sh");
        command.args(["-c", script]).stdout(Stdio::piped()).stderr(Stdio::null());
        // SAFETY: system calls only, on a descriptor that is open until the spawn has returned.
        unsafe {
            command.pre_exec(move || {
                if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 {
                    return Err(io::Error::last_os_error());
                }
                hand_in(to)
            })
        };
        let mut child = command.spawn().unwrap();
        drop(theirs);
        let (listener, over) = (take(ours.as_raw_fd()).unwrap(), AtomicBool::new(false));
        thread::scope(|scope| {
            scope.spawn(|| lend(&listener, "/lent/here", file, || !over.load(Ordering::SeqCst)));
            let mut said = String::new();
            child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
            child.wait().unwrap();
            over.store(true, Ordering::SeqCst);
            said
        })
    }

    #[test]
    fn a_file_that_can_only_be_read_is_lent_to_who_would_write_it() {
        let dir = tempfile::tempdir().unwrap();
        let (path, own) = (dir.path().join("file"), dir.path().join("own"));
        std::fs::write(&path, "kept").unwrap();
        std::fs::write(&own, "own").unwrap();
        let script = format!(
            "exec 5<>/lent/here && cat <&5; echo changed >&5 || echo refused; exec 6<>{} && cat <&6 && echo mine >&6; \
             (exec 7<>/lent/elsewhere) || echo nowhere",
            own.display()
        );
        assert_eq!(said(&script, &File::open(&path).unwrap()), "keptrefused\nownnowhere\n");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "kept");
        assert_eq!(std::fs::read_to_string(&own).unwrap(), "ownmine\n");
    }

    #[test]
    fn a_file_that_may_be_written_is() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"old").unwrap();
        file.rewind().unwrap();
        assert_eq!(said("exec 5<>/lent/here; echo new >&5; echo done", &file), "done\n");
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "new\n");
    }

    #[test]
    fn whoever_hangs_up_has_sent_nothing() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert!(take(ours.as_raw_fd()).is_err());
    }
}
