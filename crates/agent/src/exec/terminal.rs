//! A terminal for a command: a pseudo-terminal of the guest's own kernel, whose master end is the agent's.
//!
//! The command's process leads a session with it as controlling terminal and has it as all three standard streams, as
//! behind a login: so its kernel makes signals of `^C` and `^Z`, and a background process that writes is the job
//! control's concern. What it writes comes through the one stream that a terminal has.
//!
//! The host's end of input is typed as [`END_OF_INPUT`], since a terminal has no other: a reader of lines sees its end, a
//! program that reads single keys sees that key, and whoever reads on waits.
//!
//! gVisor has no `/dev/tty`: opening it fails there. The terminal's own name (`tty`) can be opened.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::pty::{posix_openpt, ptsname_r, unlockpt};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, fchown};
use tiffin_protocol::{Failure, FailureCode, TerminalSize};

use crate::reaper::Child;
use crate::request::failure;

/// `^D`.
pub const END_OF_INPUT: u8 = 4;

/// What `TERM` is where the request doesn't say.
pub const TERM: &str = "xterm-256color";

/// Columns, and rows.
const SIZES: std::ops::RangeInclusive<u16> = 1..=1000;

/// Both ends, and nothing else in the process that leads to them.
#[derive(Debug)]
pub struct Ends {
    /// The agent's, which doesn't block.
    pub master: OwnedFd,
    /// The command's.
    pub slave: OwnedFd,
}

/// Judges a size.
///
/// # Errors
/// `BadRequest`.
pub fn check(size: TerminalSize) -> Result<TerminalSize, Failure> {
    for (name, value) in [("columns", size.columns), ("rows", size.rows)] {
        if !SIZES.contains(&value) {
            let (least, most) = SIZES.into_inner();
            let rule = format!("a terminal's {name} must be {least} to {most}, not {value}");
            return Err(failure(FailureCode::BadRequest, &rule));
        }
    }
    Ok(size)
}

/// Opens one of `size` that belongs to the user.
///
/// # Errors
/// When the guest's kernel has none, or none left.
pub fn open(size: TerminalSize, uid: u32, gid: u32) -> Result<Ends, Errno> {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    let master = posix_openpt(flags)?;
    unlockpt(&master)?;
    let slave = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY | libc::O_NOFOLLOW)
        .open(ptsname_r(&master)?)
        .map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
    // Where it stays root's, programs can use it, but not open it again by its name.
    let _ = fchown(&slave, Some(uid.into()), Some(gid.into()));
    let ends = Ends { master: master.into(), slave: slave.into() };
    set_size(&ends.master, size)?;
    Ok(ends)
}

/// Changes the size, and has the programs of `command`'s session know. Linux tells those in the foreground by itself;
/// gVisor tells nobody, nor who is in the foreground, so there all are told: who doesn't listen isn't disturbed.
pub fn resize(master: &OwnedFd, size: TerminalSize, command: &Child) {
    let told_by_kernel = set_size(master, size).is_err() || knows_foreground(master);
    if !told_by_kernel && command.exit().is_none() {
        for pid in crate::processes::members(command.pid()) {
            // One that is gone by now needs no size.
            let _ = kill(Pid::from_raw(pid), Signal::SIGWINCH);
        }
    }
}

fn knows_foreground(master: &OwnedFd) -> bool {
    let mut group: libc::pid_t = 0;
    // SAFETY: the kernel fills in `group`, which outlives the call.
    unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPGRP, &mut group) == 0 }
}

fn set_size(master: &OwnedFd, size: TerminalSize) -> Result<(), Errno> {
    let size = libc::winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the kernel only reads `size`, which outlives the call.
    Errno::result(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &size) }).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_outside_the_range_are_refused_by_name() {
        let size = |columns, rows| check(TerminalSize { columns, rows });
        assert!(size(1, 1000).is_ok() && size(1000, 1).is_ok());
        for (refused, name) in [(size(0, 24), "columns"), (size(1001, 24), "columns"), (size(80, 0), "rows")] {
            let refused = refused.unwrap_err();
            assert_eq!(refused.code, FailureCode::BadRequest);
            assert!(refused.message.contains(name) && refused.message.contains("1 to 1000"), "{}", refused.message);
        }
    }
}
