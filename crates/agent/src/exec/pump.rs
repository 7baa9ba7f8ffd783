//! Carries a command's streams between its pipes, or its terminal, and the host until it ends.
//!
//! Invariants
//! * Nothing is buffered without a bound: the child's output is only read while less than `OUTBOX` waits for the host,
//!   the host's bytes only while less than `INBOX` waits for the child.
//! * Caps are exact; what is beyond them is read and dropped, so that the command isn't held up.
//! * After the command's own end, a background process that keeps a pipe open delays the answer by `DRAIN` at most.

use std::net::TcpStream;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};
use nix::unistd::{read, write};
use tiffin_protocol::{Exec, Kind};

use super::stdin::{Decoder, Violation};
use super::streams::AgentEnds;
use super::{Ended, Frame, terminal};
use crate::reaper::Child;
use crate::wire::{CHUNK, poll_timeout, push_frame};

/// Bytes waiting for the host beyond which no more output is read.
const OUTBOX: usize = 64 * 1024;

/// Bytes waiting for the child beyond which no more input is read.
const INBOX: usize = 64 * 1024;

/// How long output may still come after the command's end.
const DRAIN: Duration = Duration::from_millis(100);

/// How long the host may take nothing at all, once the command has ended.
const STALL: Duration = Duration::from_secs(30);

/// Why carrying stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The command has ended and its output is read.
    Exited,
    /// It runs on past the time limit.
    TimeLimit,
    /// The host closed the connection, or takes nothing any more.
    HostGone,
    /// The host broke the protocol.
    Broken(Violation),
}

/// A command's streams.
pub struct Pump<'a> {
    socket: &'a TcpStream,
    child: &'a Child,
    stdin: Option<OwnedFd>,
    decoder: Decoder,
    /// The terminal, to be resized.
    terminal: Option<OwnedFd>,
    inbox: Vec<u8>,
    stdout: Output,
    stderr: Output,
    outbox: Vec<u8>,
    chunk: Vec<u8>,
    /// When the host last took something.
    taken: Instant,
    stop: Option<Stop>,
}

/// One of the child's outputs.
struct Output {
    kind: Kind,
    /// None at its end.
    pipe: Option<OwnedFd>,
    /// Bytes left to send.
    cap: u64,
    truncated: bool,
    /// Once the time to drain is over: what was in the pipe then, still to be read.
    last: Option<usize>,
}

impl<'a> Pump<'a> {
    /// For the streams of `child`; `early` are bytes that came behind the request.
    pub(super) fn new(socket: &'a TcpStream, child: &'a Child, ends: AgentEnds, exec: &Exec, early: Vec<u8>) -> Self {
        let mut pump = Pump {
            socket,
            child,
            stdin: ends.stdin,
            decoder: Decoder::new(ends.terminal.is_some()),
            terminal: ends.terminal,
            inbox: Vec::new(),
            stdout: Output::new(Kind::Stdout, Some(ends.stdout), exec.stdout_cap),
            stderr: Output::new(Kind::Stderr, ends.stderr, exec.stderr_cap),
            outbox: Vec::new(),
            chunk: vec![0; CHUNK],
            taken: Instant::now(),
            stop: None,
        };
        pump.take_input(&early);
        pump
    }

    /// Carries until the command has ended, `deadline` is reached, or the host can't be served any more.
    pub fn run(&mut self, deadline: Option<Instant>) -> Stop {
        loop {
            self.flush();
            if let Some(stop) = self.stop {
                return stop;
            }
            let now = Instant::now();
            let next = match self.child.exit() {
                None if deadline.is_some_and(|deadline| now >= deadline) => return Stop::TimeLimit,
                None => deadline,
                Some(exit) => {
                    if now >= exit.at + DRAIN {
                        self.stdout.drain_no_longer();
                        self.stderr.drain_no_longer();
                    }
                    if self.stdout.pipe.is_none() && self.stderr.pipe.is_none() {
                        return Stop::Exited;
                    }
                    if self.outbox.len() >= OUTBOX && now >= self.taken.max(exit.at) + STALL {
                        return Stop::HostGone;
                    }
                    Some(if now < exit.at + DRAIN { exit.at + DRAIN } else { now + STALL })
                }
            };
            self.wait(next);
        }
    }

    /// Whether that output was cut at its cap.
    pub fn truncated(&self, kind: Kind) -> bool {
        if kind == Kind::Stdout { self.stdout.truncated } else { self.stderr.truncated }
    }

    /// Sends what waits, and `last` behind it.
    pub fn finish(mut self, last: &[Frame]) -> Ended {
        for (kind, payload) in last {
            push_frame(&mut self.outbox, *kind, payload);
        }
        while !self.outbox.is_empty() {
            // Each round has its own limit: a slow host is served as long as it takes something.
            let before = self.outbox.len();
            self.flush();
            if self.stop == Some(Stop::HostGone) {
                return Ended::HostGone;
            }
            if self.outbox.len() < before {
                continue;
            }
            let room = ready([(Some(self.socket.as_raw_fd()), libc::POLLOUT)], Some(Instant::now() + STALL));
            if room == [0] {
                return Ended::HostGone;
            }
        }
        Ended::Answered
    }

    /// Waits until something can be carried, and carries it.
    fn wait(&mut self, until: Option<Instant>) {
        let host = libc::POLLRDHUP
            | if self.inbox.len() < INBOX { libc::POLLIN } else { 0 }
            | if self.outbox.is_empty() { 0 } else { libc::POLLOUT };
        let room = self.outbox.len() < OUTBOX;
        let hungry = self.stdin.as_ref().filter(|_| !self.inbox.is_empty());
        let running = self.child.exit().is_none();
        let ready = ready(
            [
                (Some(self.socket.as_raw_fd()), host),
                (self.stdout.pipe.as_ref().filter(|_| room).map(AsRawFd::as_raw_fd), libc::POLLIN),
                (self.stderr.pipe.as_ref().filter(|_| room).map(AsRawFd::as_raw_fd), libc::POLLIN),
                (hungry.map(AsRawFd::as_raw_fd), libc::POLLOUT),
                (running.then(|| self.child.wake().as_raw_fd()), libc::POLLIN),
            ],
            until,
        );
        let [host, stdout, stderr, input, _wake] = ready;
        if stdout != 0 {
            self.stdout.carry(&mut self.chunk, &mut self.outbox);
        }
        if stderr != 0 {
            self.stderr.carry(&mut self.chunk, &mut self.outbox);
        }
        if input != 0 {
            self.feed();
        }
        // RDHUP tells that the host is gone even while its bytes are left unread.
        if host & (libc::POLLERR | libc::POLLHUP | libc::POLLRDHUP) != 0 {
            self.stop = Some(Stop::HostGone);
        } else if host & libc::POLLIN != 0 {
            self.receive();
        }
    }

    fn receive(&mut self) {
        match recv(self.socket.as_raw_fd(), &mut self.chunk, MsgFlags::MSG_DONTWAIT) {
            Ok(0) => self.stop = Some(Stop::HostGone),
            Ok(count) => {
                let chunk = std::mem::take(&mut self.chunk);
                self.take_input(&chunk[..count]);
                self.chunk = chunk;
            }
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(_) => self.stop = Some(Stop::HostGone),
        }
    }

    fn take_input(&mut self, bytes: &[u8]) {
        let ended_before = self.decoder.ended();
        if let Err(violation) = self.decoder.push(bytes, &mut self.inbox) {
            self.stop = Some(Stop::Broken(violation));
        }
        if let Some(master) = &self.terminal {
            if let Some(size) = self.decoder.new_size() {
                terminal::resize(master, size, self.child);
            }
            if self.decoder.ended() && !ended_before {
                self.inbox.push(terminal::END_OF_INPUT);
            }
        }
        if self.stdin.is_none() {
            // The command has closed its input, or has none: the rest is for nobody.
            self.inbox.clear();
        }
        self.feed();
    }

    /// Gives the child what waits for it, as much as it takes.
    fn feed(&mut self) {
        let Some(pipe) = &self.stdin else { return };
        while !self.inbox.is_empty() {
            match write(pipe, &self.inbox) {
                Ok(0) | Err(Errno::EAGAIN) => return,
                Ok(count) => drop(self.inbox.drain(..count)),
                Err(Errno::EINTR) => {}
                Err(_) => {
                    // It closed its input; that is its right.
                    self.inbox.clear();
                    self.stdin = None;
                    return;
                }
            }
        }
        if self.decoder.ended() {
            self.stdin = None;
        }
    }

    /// Gives the host what waits for it, as much as it takes.
    fn flush(&mut self) {
        while !self.outbox.is_empty() {
            match send(self.socket.as_raw_fd(), &self.outbox, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL) {
                Ok(count) => {
                    self.outbox.drain(..count);
                    self.taken = Instant::now();
                }
                Err(Errno::EAGAIN) => return,
                Err(Errno::EINTR) => {}
                Err(_) => {
                    self.stop = Some(Stop::HostGone);
                    return;
                }
            }
        }
    }
}

impl Output {
    fn new(kind: Kind, pipe: Option<OwnedFd>, cap: u64) -> Self {
        Output { kind, pipe, cap, truncated: false, last: None }
    }

    /// From now on, only what is in the pipe already is read.
    fn drain_no_longer(&mut self) {
        let Some(pipe) = self.pipe.as_ref().filter(|_| self.last.is_none()) else { return };
        let mut left: libc::c_int = 0;
        // SAFETY: `left` is the int that FIONREAD fills in.
        let told = unsafe { libc::ioctl(pipe.as_raw_fd(), libc::FIONREAD, &mut left) };
        match usize::try_from(left) {
            Ok(left @ 1..) if told == 0 => self.last = Some(left),
            _ => self.pipe = None,
        }
    }

    /// Reads once, when there is something to read, and appends what the cap allows to `outbox`.
    fn carry(&mut self, chunk: &mut [u8], outbox: &mut Vec<u8>) {
        let Some(pipe) = &self.pipe else { return };
        let wanted = self.last.unwrap_or(chunk.len()).min(chunk.len());
        let count = match read(pipe, &mut chunk[..wanted]) {
            Err(Errno::EINTR | Errno::EAGAIN) => return,
            Ok(0) | Err(_) => {
                self.pipe = None;
                return;
            }
            Ok(count) => count,
        };
        let sent = usize::try_from(self.cap).unwrap_or(usize::MAX).min(count);
        if sent > 0 {
            push_frame(outbox, self.kind, &chunk[..sent]);
        }
        self.cap -= sent as u64;
        self.truncated |= sent < count;
        if let Some(last) = &mut self.last {
            *last -= count;
            if *last == 0 {
                self.pipe = None;
            }
        }
    }
}

/// Polls descriptors for events, none of them past `until`; what came of each, zero for all when it failed. By hand,
/// since `nix` lacks RDHUP.
fn ready<const COUNT: usize>(
    watched: [(Option<RawFd>, libc::c_short); COUNT],
    until: Option<Instant>,
) -> [libc::c_short; COUNT] {
    // A negative descriptor is passed over.
    let mut fds = watched.map(|(fd, events)| libc::pollfd { fd: fd.unwrap_or(-1), events, revents: 0 });
    let timeout = until.map_or(-1, |until| i32::from(poll_timeout(until)));
    // SAFETY: `fds` is an array of that many, and outlives the call.
    unsafe { libc::poll(fds.as_mut_ptr(), COUNT as libc::nfds_t, timeout) };
    fds.map(|fd| fd.revents)
}
