//! The agent's standard output: what it has to say, and what the guest's program prints.
//!
//! All of it is a guest's word. A frame has a bound before it is read; whoever is root in the guest can write there, too, so
//! nothing that comes may do more than end this very guest or add to its own log. While nothing is read the guest's program
//! waits: nothing is held here but one batch.

use std::{
    io::{self, BufRead, BufReader, Read},
    os::fd::AsFd,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tiffin_logs::Stream;
use tiffin_protocol::{CHANNEL_FRAME, Event, HEADER, Kind, decode_header};
use tiffin_types::vm::{EndReason, EndReport};

use super::{state::Vm, words};

/// How long a guest whose program ended has to end as well.
const LAST_STEPS: Duration = Duration::from_secs(15);
/// Bytes that are read at once.
const READ: usize = 64 * 1024;
/// Output that is handed to the log at once.
const BATCH: usize = 32 * 1024;
/// How often the log is looked after while nothing comes, in milliseconds.
const QUIET_MS: u16 = 60_000;

/// Follows the channel until it ends. What breaks the protocol ends the following, not the reading: a guest must not come to
/// stand because nobody empties its pipe. A guest whose program's output could no longer be told is ended.
pub(super) fn follow(vm: &Arc<Vm>, from: impl Read + AsFd) {
    let mut from = BufReader::with_capacity(READ, from);
    let mut batch = Batch::default();
    let broken = loop {
        if from.buffer().is_empty() {
            batch.flush(vm);
            wait(vm, from.get_ref());
        }
        match next(&mut from, &mut batch, vm) {
            Ok(Some(Event::Ready { .. })) => vm.ready(),
            Ok(Some(Event::Failed { message })) => {
                let message = words::plain(&message);
                vm.errors.line(format!("the agent failed: {message}"));
                vm.decide_end(EndReason::BootFailed, format!("the guest could not be set up: {message}"));
            }
            Ok(Some(Event::Exited { code, signal })) => exited(vm, code, signal),
            Ok(None) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break None,
            Err(error) => break Some(error),
        }
    };
    batch.flush(vm);
    if let Some(error) = broken {
        vm.errors.line(format!("the agent's channel: {error}"));
        if vm.launch.spec.program.is_some() || vm.output.is_begun() {
            let message = "something in the guest, run as root, wrote into the agent's own channel";
            vm.decide_end(EndReason::AgentLost, message);
        }
        let _ = io::copy(&mut from, &mut io::sink());
    }
    if let Some(trouble) = vm.output.finish() {
        vm.errors.line(trouble);
    }
}

/// Waits until something comes; looks after the log meanwhile.
fn wait(vm: &Vm, from: &impl AsFd) {
    loop {
        match poll(&mut [PollFd::new(from.as_fd(), PollFlags::POLLIN)], PollTimeout::from(QUIET_MS)) {
            Ok(0) => vm.output.tick(),
            Err(nix::errno::Errno::EINTR) => {}
            // The read says what is wrong.
            Ok(_) | Err(_) => return,
        }
    }
}

/// Output of one stream that waits to be handed on.
#[derive(Default)]
struct Batch {
    stream: Option<Stream>,
    bytes: Vec<u8>,
}

impl Batch {
    fn add(&mut self, stream: Stream, bytes: &[u8], vm: &Vm) {
        if self.stream != Some(stream) || self.bytes.len() + bytes.len() > BATCH {
            self.flush(vm);
        }
        self.stream = Some(stream);
        self.bytes.extend_from_slice(bytes);
    }

    fn flush(&mut self, vm: &Vm) {
        if let Some(stream) = self.stream.take() {
            vm.output.push(stream, &self.bytes);
            self.bytes.clear();
        }
    }
}

/// The next frame: an event, or output that is in the batch then.
fn next(from: &mut impl BufRead, batch: &mut Batch, vm: &Vm) -> io::Result<Option<Event>> {
    let mut header = [0; HEADER];
    from.read_exact(&mut header)?;
    let length = decode_header(header).map_err(io::Error::other)?;
    if HEADER + length > CHANNEL_FRAME {
        return Err(io::Error::other(format!("a frame of {length} bytes")));
    }
    let mut bytes = [0; CHANNEL_FRAME];
    let bytes = &mut bytes[..length];
    from.read_exact(bytes)?;
    match Kind::from_byte(bytes[0]).map_err(io::Error::other)? {
        Kind::Event => serde_json::from_slice(&bytes[1..]).map(Some).map_err(io::Error::other),
        Kind::Stdout => {
            batch.add(Stream::Stdout, &bytes[1..], vm);
            Ok(None)
        }
        Kind::Stderr => {
            batch.add(Stream::Stderr, &bytes[1..], vm);
            Ok(None)
        }
        other @ (Kind::Request
        | Kind::Stdin
        | Kind::StdinEnd
        | Kind::Done
        | Kind::Failed
        | Kind::Result
        | Kind::Resize) => Err(io::Error::other(format!("a {other:?} frame"))),
    }
}

/// The program's end is the VM's: the agent sees to that, or the monitor when it takes too long.
fn exited(vm: &Arc<Vm>, code: i32, signal: Option<i32>) {
    let message = match signal {
        None => format!("the program ended with exit code {code}"),
        Some(signal) => format!("the program was ended by signal {signal}"),
    };
    let first = vm.note_exit(EndReport { reason: EndReason::Exited, message: message.clone(), exit_code: Some(code) });
    if !first {
        return;
    }
    vm.engine_log.line(message);
    let of = Arc::clone(vm);
    let thread = thread::Builder::new().name("exited".into()).stack_size(64 * 1024);
    let spawned = thread.spawn(move || {
        let over = of.wait_for_end(Instant::now() + LAST_STEPS);
        if !over {
            of.engine_log.line("the guest did not end with its program: killed");
            of.kill_all();
        }
    });
    if let Err(error) = spawned {
        vm.errors.line(format!("waiting for the guest's end: {error}"));
    }
}
