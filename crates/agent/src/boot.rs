//! The first steps: hiding from the guest, the channel to the monitor, the boot line.
//!
//! Invariant: after [`take_over`] no descriptor of the agent but 0, 1 and 2 is inherited, and 1 no longer leads to the
//! monitor. Doesn't touch the guest's file system; see [`crate::guest`].

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, pthread_sigmask};
use tiffin_protocol::Boot;

use crate::channel::Channel;

/// The longest boot line, in bytes.
pub const MAX_BOOT_LINE: usize = 64 * 1024;

/// Where to stop looking for inherited descriptors on a kernel that can't close them all at once.
const OLD_DESCRIPTORS: libc::c_int = 1024;

/// The last signal's number.
const LAST_SIGNAL: libc::c_int = 64;

/// Handled by the Rust runtime to tell a stack overflow; a program starts without its parent's handlers anyway.
const RUNTIME_SIGNALS: [libc::c_int; 2] = [libc::SIGSEGV, libc::SIGBUS];

/// Why the agent could not come up.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// Its own process could not be prepared.
    #[error("can't prepare the process: {0}")]
    Process(#[source] io::Error),
    /// Standard input failed.
    #[error("can't read the boot line: {0}")]
    Read(#[source] io::Error),
    /// The boot line is over [`MAX_BOOT_LINE`].
    #[error("the boot line is longer than {MAX_BOOT_LINE} bytes")]
    TooLong,
    /// The boot line isn't a `Boot`, or has no token. Doesn't repeat the line, which has the secret.
    #[error("the boot line can't be understood (column {0})")]
    Malformed(usize),
    /// The port can't be had.
    #[error("can't listen: {0}")]
    Listen(#[source] io::Error),
    /// A thread can't be started.
    #[error("can't start a thread: {0}")]
    Thread(#[source] io::Error),
}

/// Hides the process from the guest, blocks its signals, and keeps standard output as the channel to the monitor.
///
/// # Errors
/// [`BootError::Process`].
pub fn take_over() -> Result<Channel, BootError> {
    let prepare = || -> nix::Result<File> {
        nix::sys::prctl::set_dumpable(false)?;
        close_inherited();
        block_signals()?;
        let channel = fcntl(io::stdout().as_fd(), FcntlArg::F_DUPFD_CLOEXEC(3))?;
        nix::unistd::dup2_stdout(io::stderr().as_fd())?;
        // SAFETY: fcntl just made this descriptor; nothing else owns it.
        Ok(File::from(unsafe { <std::os::fd::OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(channel) }))
    };
    prepare().map(Channel::new).map_err(|errno| BootError::Process(errno.into()))
}

/// Closes what the engine may have left open beyond the standard streams, before anything else is opened.
fn close_inherited() {
    // SAFETY: nothing in the process owns a descriptor above 2 yet.
    unsafe {
        if libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) != 0 {
            for descriptor in 3..OLD_DESCRIPTORS {
                libc::close(descriptor);
            }
        }
    }
}

/// Blocks what can be blocked, in this thread and those it starts, and puts every disposition back to its default: the
/// engine's, and the Rust runtime's of SIGPIPE. So a command's process, which inherits both, only has to unblock. Blocked,
/// no signal can harm the agent.
fn block_signals() -> nix::Result<()> {
    let mut blocked = SigSet::all();
    for fault in [Signal::SIGSEGV, Signal::SIGBUS, Signal::SIGILL, Signal::SIGFPE, Signal::SIGABRT, Signal::SIGTRAP] {
        blocked.remove(fault);
    }
    pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&blocked), None)?;
    // The kernel's own structure: handler, flags, restorer, mask, all zero for the default.
    let default = [0u64; 4];
    for signal in (1..=LAST_SIGNAL).filter(|signal| !RUNTIME_SIGNALS.contains(signal)) {
        // The raw call: the C library refuses the two signals that it keeps for itself.
        // SAFETY: the default disposition installs no handler; the kernel only reads `default`. Refused for SIGKILL and
        // SIGSTOP, which are always at their default.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), std::ptr::null_mut::<u64>(), 8usize) };
    }
    Ok(())
}

/// Reads the boot line. Bytes after the first newline are ignored.
///
/// # Errors
/// [`BootError::Read`], [`BootError::TooLong`], [`BootError::Malformed`].
pub fn read(input: impl Read) -> Result<Boot, BootError> {
    let mut line = Vec::new();
    let mut input = input.take(MAX_BOOT_LINE as u64 + 1);
    let mut chunk = [0; 4096];
    while !line.contains(&b'\n') {
        match input.read(&mut chunk) {
            Ok(0) => break,
            Ok(count) => line.extend_from_slice(&chunk[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(BootError::Read(error)),
        }
    }
    let length = line.iter().position(|byte| *byte == b'\n').unwrap_or(line.len());
    if length > MAX_BOOT_LINE {
        return Err(BootError::TooLong);
    }
    let boot: Boot = serde_json::from_slice(&line[..length]).map_err(|error| BootError::Malformed(error.column()))?;
    if boot.token.is_empty() {
        return Err(BootError::Malformed(0));
    }
    Ok(boot)
}

/// Replaces standard input by `/dev/null`, which commands without input inherit.
///
/// # Errors
/// [`BootError::Process`].
pub fn drop_stdin() -> Result<(), BootError> {
    let replace = || -> io::Result<()> {
        match File::open("/dev/null") {
            Ok(null) => nix::unistd::dup2_stdin(&null)?,
            // An image without /dev/null: the read end of a pipe without a writer reads as empty, too.
            Err(_) => nix::unistd::dup2_stdin(&nix::unistd::pipe()?.0)?,
        }
        Ok(())
    };
    replace().map_err(BootError::Process)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LINE: &str = r#"{"token":"t","hostname":"h","addresses":[],"resolvers":[],"cpus":1,"max_pids":9}"#;

    #[test]
    fn a_boot_line_is_read_up_to_its_newline() {
        let boot = read(format!("{LINE}\nmore").as_bytes()).unwrap();
        assert_eq!((boot.token.as_str(), boot.max_pids), ("t", 9));
    }

    #[test]
    fn an_endless_boot_line_is_refused_at_its_bound() {
        assert!(matches!(read(io::repeat(b'x')), Err(BootError::TooLong)));
    }

    #[test]
    fn an_empty_token_is_refused() {
        let line = LINE.replace(r#""token":"t""#, r#""token":"""#);
        assert!(matches!(read(line.as_bytes()), Err(BootError::Malformed(_))));
    }

    #[test]
    fn a_refusal_does_not_repeat_the_secret() {
        let error = read(r#"{"token":"hush","hostname":5}"#.as_bytes()).unwrap_err();
        assert!(!error.to_string().contains("hush"), "{error}");
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_boot_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            // A random line is never a whole `Boot`; what matters is that it returns.
            prop_assert!(read(&bytes[..]).is_err());
        }
    }
}
