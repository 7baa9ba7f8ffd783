//! A command's standard streams, each with two ends: pipes, or one terminal for all three.
//!
//! Invariant: no end is inherited by any process but the one that it is meant for.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::{Gid, Uid, fchown, pipe2};
use tiffin_protocol::TerminalSize;

use super::terminal;

/// The agent's ends.
#[derive(Debug)]
pub struct AgentEnds {
    /// Where input goes, if it is wanted; doesn't block.
    pub stdin: Option<OwnedFd>,
    /// Where output comes from.
    pub stdout: OwnedFd,
    /// The other output; a terminal has but one.
    pub stderr: Option<OwnedFd>,
    /// The terminal, if it is one.
    pub terminal: Option<OwnedFd>,
}

/// The command's ends, to be closed once it has them.
#[derive(Debug)]
pub enum ChildEnds {
    /// One pipe each.
    Pipes {
        /// None is the agent's own, which is empty.
        stdin: Option<OwnedFd>,
        /// Standard output.
        stdout: OwnedFd,
        /// Standard error.
        stderr: OwnedFd,
    },
    /// A terminal for all.
    Terminal(OwnedFd),
}

impl ChildEnds {
    /// What becomes descriptor 0, 1 and 2.
    pub fn stdio(&self) -> [Option<RawFd>; 3] {
        match self {
            ChildEnds::Pipes { stdin, stdout, stderr } => {
                [stdin.as_ref().map(AsRawFd::as_raw_fd), Some(stdout.as_raw_fd()), Some(stderr.as_raw_fd())]
            }
            ChildEnds::Terminal(slave) => [Some(slave.as_raw_fd()); 3],
        }
    }
}

/// Pipes that belong to the user, who may want to open them again by name (`/dev/stderr`); for standard input only where it is
/// wanted.
///
/// # Errors
/// When there is no descriptor left.
pub fn pipes(with_stdin: bool, uid: u32, gid: u32) -> Result<(AgentEnds, ChildEnds), Errno> {
    let (stdout, child_stdout) = pipe2(OFlag::O_CLOEXEC)?;
    let (stderr, child_stderr) = pipe2(OFlag::O_CLOEXEC)?;
    let (child_stdin, stdin) = if with_stdin {
        let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
        fcntl(&write, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        (Some(read), Some(write))
    } else {
        (None, None)
    };
    for pipe in [Some(&child_stdout), Some(&child_stderr), child_stdin.as_ref()].into_iter().flatten() {
        // A kernel that refuses takes away the convenience alone.
        let _ = fchown(pipe, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
    }
    let child = ChildEnds::Pipes { stdin: child_stdin, stdout: child_stdout, stderr: child_stderr };
    Ok((AgentEnds { stdin, stdout, stderr: Some(stderr), terminal: None }, child))
}

/// A terminal of `size` that belongs to the user.
///
/// # Errors
/// When the guest's kernel has none, or no descriptor is left.
pub fn terminal(size: TerminalSize, uid: u32, gid: u32) -> Result<(AgentEnds, ChildEnds), Errno> {
    let ends = terminal::open(size, uid, gid)?;
    let again = || ends.master.try_clone().map_err(|error| error.raw_os_error().map_or(Errno::EMFILE, Errno::from_raw));
    let (stdin, resized) = (again()?, again()?);
    let agent = AgentEnds { stdin: Some(stdin), stdout: ends.master, stderr: None, terminal: Some(resized) };
    Ok((agent, ChildEnds::Terminal(ends.slave)))
}
