//! Carries what the program prints to the monitor, tells of its end, and then ends the guest.
//!
//! Invariants
//! * Nothing is held but one chunk: the program's output is read only once the last was taken.
//! * The exit is told once what was printed by then is carried, or the time to drain later where a process that was left behind
//!   prints on; that goes on being carried until the last of them is gone.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::read;
use tiffin_protocol::{Event, Kind};

use super::{LAST_WORDS, Program};
use crate::exec::Guest;
use crate::exec::streams::AgentEnds;
use crate::reaper::{Child, Exit};
use crate::wire::poll_timeout;

/// Bytes that are read at once: as many as a pipe holds.
const CHUNK: usize = 64 * 1024;

/// A program that prints line by line, one upon the other, is let print for so long between two reads: reading each line
/// at once takes the processor that it prints with.
const GATHER: Duration = Duration::from_millis(1);

/// Bytes that are worth a read.
const ENOUGH: usize = 8 * 1024;

/// How long what is left behind may go on printing before the exit is told.
const DRAIN: Duration = Duration::from_millis(100);

/// How long what is left behind has between SIGTERM and SIGKILL.
const GRACE: Duration = Duration::from_secs(2);

/// Between two looks whether all processes are gone.
const LOOK: Duration = Duration::from_millis(20);

/// One program's carrier.
pub(super) struct Carrier {
    program: Arc<Program>,
    guest: Arc<Guest>,
    child: Arc<Child>,
    /// None at its end.
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    chunk: Vec<u8>,
    /// When there was output last.
    last: Instant,
    /// It came soon upon what was before, and was little.
    trickles: bool,
}

impl Carrier {
    pub(super) fn new(program: Arc<Program>, guest: Arc<Guest>, child: Arc<Child>, ends: AgentEnds) -> Self {
        Carrier {
            program,
            guest,
            child,
            stdout: Some(ends.stdout),
            stderr: ends.stderr,
            chunk: vec![0; CHUNK],
            last: Instant::now(),
            trickles: false,
        }
    }

    /// The carrier's whole life.
    pub(super) fn run(mut self) {
        let exit = self.carry_to_exit();
        self.program.channel.event(&Event::Exited { code: exit.code, signal: exit.signal });
        if !self.program.ended_by_itself() {
            // The shutdown ends the rest, and waits for this.
            self.carry_while(|| true);
            self.program.set_carried();
            return;
        }
        let guest = Arc::clone(&self.guest);
        let ender = std::thread::Builder::new().stack_size(crate::listen::STACK).spawn(move || {
            guest.park.close(&guest);
            crate::shutdown::end_guest(GRACE);
        });
        match ender {
            Ok(ender) => self.carry_while(|| !ender.is_finished()),
            Err(error) => {
                eprintln!("tiffin-agent: ending the guest at once: {error}");
                crate::shutdown::end_guest(Duration::ZERO);
            }
        }
        let mut last = Instant::now();
        while !self.is_done() && Instant::now() < last + LAST_WORDS {
            if self.carry_once(Some(Instant::now() + LOOK)) {
                last = Instant::now();
            }
        }
        self.program.set_carried();
        crate::shutdown::leave(0);
    }

    /// Carries until the program has ended and what it printed is on its way.
    fn carry_to_exit(&mut self) -> Exit {
        loop {
            match self.child.exit() {
                None => self.carry_once(None),
                Some(exit) => {
                    let over = exit.at + DRAIN;
                    if self.is_done() || Instant::now() >= over || !self.carry_once(Some(Instant::now())) {
                        return exit;
                    }
                    true
                }
            };
        }
    }

    /// Carries until both outputs have ended, or `going` says no more.
    fn carry_while(&mut self, going: impl Fn() -> bool) {
        while !self.is_done() && going() {
            self.carry_once(Some(Instant::now() + LOOK));
        }
    }

    fn is_done(&self) -> bool {
        self.stdout.is_none() && self.stderr.is_none()
    }

    /// Waits for output, or for the program's end while there is no deadline; whether there was output, or its end.
    fn carry_once(&mut self, until: Option<Instant>) -> bool {
        if until.is_none() && self.trickles {
            std::thread::sleep(GATHER);
        }
        let timeout = until.map_or(PollTimeout::NONE, poll_timeout);
        let ready = {
            let running = until.is_none().then(|| self.child.wake());
            let watched = [self.stdout.as_ref().map(AsFd::as_fd), self.stderr.as_ref().map(AsFd::as_fd), running];
            let mut fds: Vec<PollFd<'_>> =
                watched.iter().flatten().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
            if poll(&mut fds, timeout).is_err() {
                return true;
            }
            let mut told = fds.iter().map(|fd| fd.any() == Some(true));
            watched.map(|fd| fd.is_some() && told.next() == Some(true))
        };
        let mut carried = 0;
        if ready[0] {
            carried += carry(&self.program, Kind::Stdout, &mut self.stdout, &mut self.chunk);
        }
        if ready[1] {
            carried += carry(&self.program, Kind::Stderr, &mut self.stderr, &mut self.chunk);
        }
        let now = Instant::now();
        self.trickles = (1..ENOUGH).contains(&carried) && now.duration_since(self.last) < 2 * GATHER;
        self.last = now;
        ready[0] || ready[1]
    }
}

/// Reads once, and passes it on; how many bytes.
fn carry(program: &Program, kind: Kind, pipe: &mut Option<OwnedFd>, chunk: &mut [u8]) -> usize {
    let Some(open) = pipe else { return 0 };
    match read(&*open, chunk) {
        Err(Errno::EINTR | Errno::EAGAIN) => 0,
        Ok(0) | Err(_) => {
            *pipe = None;
            0
        }
        Ok(count) => {
            if let Err(error) = program.channel.print(kind, &chunk[..count]) {
                // Without a monitor there is no VM for long; the program must not come to stand meanwhile.
                eprintln!("tiffin-agent: what the program printed is lost: {error}");
            }
            count
        }
    }
}
