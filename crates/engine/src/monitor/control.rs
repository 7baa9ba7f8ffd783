//! The monitor's socket: one question per connection, answered by a thread of its own. Some wait for connections, so that
//! no question waits for a thread to start.
//!
//! Only root can connect (the folder and the socket are root's), so what comes is trusted to be the server's; it is
//! still bounded: what takes time leaves room for those who ask for the guest's state or its end.

use std::{
    io::{self, BufRead, BufReader, IoSlice, Read, Write},
    os::{
        fd::AsRawFd,
        unix::net::{UnixListener, UnixStream},
    },
    sync::{
        Arc, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::{
    agent, egress,
    launch::{Ask, Phase, Reply},
    pause, program, save,
    state::{Vm, Waiter},
};

/// Connections at once.
const MAX_CONNECTIONS: usize = 256;
/// Connections at once whose answer takes the guest, or another's turn: the rest is for the others.
const MAX_SLOW: usize = 192;
/// Threads that wait for a connection, at most, besides those that answer.
const KEPT: usize = 2;
/// How long to leave a socket alone that can't accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(10);
/// How long a dial waits while there must be none.
const DIAL_PATIENCE: Duration = Duration::from_secs(5);
/// Bytes of a question.
const MAX_ASK: u64 = 4096;
/// How often it is looked whether somebody who waits for the guest's end is still there.
const HANG_UP_INTERVAL: Duration = Duration::from_secs(2);
/// How much longer than its grace a shutdown may take before the guest is killed.
const STOP_MARGIN: Duration = Duration::from_secs(2);

/// Serves the socket from now on, on threads of its own.
pub(super) fn serve(vm: Arc<Vm>, socket: UnixListener) -> io::Result<()> {
    Arc::new(Desk { vm, socket, waiting: AtomicUsize::new(0), open: Arc::default(), slow: Arc::default() })
        .start_thread()
}

/// What the threads share.
struct Desk {
    vm: Arc<Vm>,
    socket: UnixListener,
    /// Threads that wait for a connection.
    waiting: AtomicUsize,
    open: Arc<AtomicUsize>,
    slow: Arc<AtomicUsize>,
}

impl Desk {
    fn start_thread(self: &Arc<Self>) -> io::Result<()> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let desk = Arc::clone(self);
        let serve = move || while desk.serve_next() {};
        let started = thread::Builder::new().name("control".into()).stack_size(128 * 1024).spawn(serve);
        if started.is_err() {
            self.waiting.fetch_sub(1, Ordering::SeqCst);
        }
        started.map(drop)
    }

    /// Waits for a connection and serves it; whether to wait for another.
    fn serve_next(self: &Arc<Self>) -> bool {
        let accepted = self.socket.accept();
        let others = self.waiting.fetch_sub(1, Ordering::SeqCst) - 1;
        match accepted {
            // Where nobody would wait any more, and no thread can be had, the connection is closed.
            Ok((connection, _)) if others > 0 || self.start_thread().is_ok() => {
                if let Some(_counted) = Counted::one_of(&self.open, MAX_CONNECTIONS) {
                    // The server hung up: there is nobody to tell.
                    let _ = serve_one(&self.vm, &self.slow, connection);
                }
            }
            Ok(_) => {}
            Err(_) => thread::sleep(ACCEPT_PAUSE),
        }
        let stays = |waiting| if waiting < KEPT { Some(waiting + 1) } else { None };
        self.waiting.fetch_update(Ordering::SeqCst, Ordering::SeqCst, stays).is_ok()
    }
}

/// One of those that are counted, until it is dropped.
struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn one_of(count: &Arc<AtomicUsize>, most: usize) -> Option<Self> {
        let one = Self(Arc::clone(count));
        if count.fetch_add(1, Ordering::SeqCst) < most { Some(one) } else { None }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn is_slow(ask: &Ask) -> bool {
    match ask {
        Ask::Dial { .. } | Ask::Pause | Ask::Resume | Ask::Program | Ask::Save { .. } | Ask::Egress => true,
        Ask::Phase | Ask::Watch | Ask::Stop { .. } | Ask::Kill | Ask::Denied => false,
    }
}

fn serve_one(vm: &Vm, slow: &Arc<AtomicUsize>, mut connection: UnixStream) -> io::Result<()> {
    connection.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut line = String::new();
    BufReader::new((&connection).take(MAX_ASK)).read_line(&mut line)?;
    let ask: Ask = serde_json::from_str(&line).map_err(io::Error::other)?;
    let counted = if is_slow(&ask) { Some(Counted::one_of(slow, MAX_SLOW)) } else { None };
    if matches!(counted, Some(None)) {
        return say(&mut connection, &Reply::Busy);
    }
    if is_slow(&ask) || matches!(ask, Ask::Stop { .. }) {
        vm.rest.attend(vm.sandbox.get());
    }
    match ask {
        Ask::Phase => say(&mut connection, &Reply::Phase { phase: vm.phase() }),
        Ask::Watch => watch(vm, &mut connection),
        Ask::Dial { port } => dial(vm, &mut connection, port),
        Ask::Stop { grace_ms } => {
            let waiter = vm.waiter();
            stop(vm, Duration::from_millis(grace_ms), &waiter);
            tell_end(&waiter, &mut connection)
        }
        Ask::Kill => {
            let waiter = vm.waiter();
            vm.request_stop();
            vm.kill_all();
            tell_end(&waiter, &mut connection)
        }
        Ask::Pause => freeze(vm, &mut connection, Phase::Running, Phase::Paused, pause::pause),
        Ask::Resume => {
            let resume = |vm: &Vm| pause::resume(vm, pause::QUICK);
            freeze(vm, &mut connection, Phase::Paused, Phase::Running, resume)
        }
        Ask::Program => {
            let reply = program::start(vm);
            say(&mut connection, &reply)
        }
        Ask::Denied => {
            let denied = vm.denied.lock().map(|counts| counts.report()).unwrap_or_default();
            say(&mut connection, &Reply::Denied { denied })
        }
        Ask::Save { into } => {
            let reply = save::save(vm, &into, || hung_up(&connection));
            say(&mut connection, &reply)
        }
        Ask::Egress => {
            let reply = egress::change(vm);
            say(&mut connection, &reply)
        }
    }
}

fn say(connection: &mut UnixStream, reply: &Reply) -> io::Result<()> {
    connection.write_all(&line(reply)?)
}

fn line(reply: &Reply) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(reply).map_err(io::Error::other)?;
    line.push(b'\n');
    Ok(line)
}

fn refuse(connection: &mut UnixStream, message: impl Into<String>) -> io::Result<()> {
    say(connection, &Reply::refused(message.into()))
}

fn watch(vm: &Vm, connection: &mut UnixStream) -> io::Result<()> {
    let waiter = vm.waiter();
    loop {
        match vm.wait_while(Phase::Starting, Some(Instant::now() + HANG_UP_INTERVAL)) {
            None if hung_up(connection) => return Ok(()),
            None => {}
            Some(Phase::Ended) => break,
            Some(Phase::Starting | Phase::Running | Phase::Paused) => {
                say(connection, &Reply::Ready)?;
                break;
            }
        }
    }
    tell_end(&waiter, connection)
}

/// Waits for the end and passes it on.
fn tell_end(waiter: &Waiter, connection: &mut UnixStream) -> io::Result<()> {
    loop {
        match waiter.wait(Some(Instant::now() + HANG_UP_INTERVAL)) {
            Some(report) => return say(connection, &Reply::Ended { report }),
            None if hung_up(connection) => return Ok(()),
            None => {}
        }
    }
}

/// Whether the asker is gone: a server that was killed must not keep its threads here.
fn hung_up(connection: &UnixStream) -> bool {
    let mut byte = 0u8;
    // SAFETY: recv(2) of one byte into a local, on an open socket.
    let peeked = unsafe {
        let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
        libc::recv(connection.as_raw_fd(), (&raw mut byte).cast(), 1, flags)
    };
    peeked == 0
}

fn dial(vm: &Vm, connection: &mut UnixStream, port: u16) -> io::Result<()> {
    if vm.phase() != Phase::Running {
        return say(connection, &Reply::NotRunning);
    }
    let dialled = {
        let Some(_allowed) = vm.dials_until(Instant::now() + DIAL_PATIENCE) else {
            return say(connection, &Reply::Busy);
        };
        agent::begin_dial(port)
    };
    match dialled {
        Ok(socket) => {
            let fds = [socket.as_raw_fd()];
            let reply = line(&Reply::Dialled)?;
            sendmsg::<()>(
                connection.as_raw_fd(),
                &[IoSlice::new(&reply)],
                &[ControlMessage::ScmRights(&fds)],
                MsgFlags::empty(),
                None,
            )?;
            Ok(())
        }
        Err(error) => {
            let number =
                if error.kind() == io::ErrorKind::TimedOut { Some(libc::ETIMEDOUT) } else { error.raw_os_error() };
            say(connection, &Reply::Refused { message: error.to_string(), errno: number })
        }
    }
}

/// Asks the guest to end and kills what is left after the grace.
fn stop(vm: &Vm, grace: Duration, waiter: &Waiter) {
    vm.request_stop();
    let deadline = Instant::now() + grace + STOP_MARGIN;
    // Nobody pauses or saves it from here on. A save that is under way gives up at its next step.
    let alone = vm.tools_until(deadline);
    let left = deadline.saturating_duration_since(Instant::now());
    if vm.phase() == Phase::Paused && alone.is_some() && pause::resume(vm, left).is_ok() {
        vm.set_phase(Phase::Running);
    }
    if alone.is_none() {
        vm.engine_log.line("the guest was not free to be asked to end within the grace: killed");
    } else if vm.phase() == Phase::Running {
        match agent::shut_down(vm, grace, grace + STOP_MARGIN) {
            Ok(()) if waiter.wait(Some(deadline)).is_some() => return,
            Ok(()) => vm.engine_log.line("the guest did not end within the grace: killed"),
            Err(error) => vm.engine_log.line(format!("the guest could not be asked to end ({error}): killed")),
        }
    }
    vm.kill_all();
}

fn freeze(
    vm: &Vm,
    connection: &mut UnixStream,
    from: Phase,
    to: Phase,
    change: impl FnOnce(&Vm) -> Result<(), String>,
) -> io::Result<()> {
    let _alone = vm.tools.lock().unwrap_or_else(PoisonError::into_inner);
    let phase = vm.phase();
    if phase == to {
        return say(connection, &Reply::Done);
    }
    if phase != from || vm.stop_requested() {
        return say(connection, &Reply::NotRunning);
    }
    match change(vm) {
        Ok(()) => {
            vm.set_phase(to);
            if to == Phase::Running && vm.owes_news() {
                egress::tell(vm);
            }
            say(connection, &Reply::Done)
        }
        Err(error) => {
            vm.errors.line(error);
            refuse(connection, "the engine could not do it")
        }
    }
}
