//! The agent's standard output: what it has to say, and what the guest's program prints.
//!
//! All of it is a guest's word. A frame has a bound before it is read; whoever is root in the guest can write there, too, so
//! nothing that comes may do more than end this very guest or add to its own log.

use std::{
    io::{self, Read},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use tiffin_protocol::{CHANNEL_FRAME, Event, HEADER, Kind, decode_header};
use tiffin_types::vm::{EndReason, EndReport};

use super::state::Vm;

/// How long a guest whose program ended has to end as well.
const LAST_STEPS: Duration = Duration::from_secs(15);

/// Follows the channel until it ends. What breaks the protocol ends the following, not the reading: a guest must not come to
/// stand because nobody empties its pipe.
pub(super) fn follow(vm: &Arc<Vm>, mut from: impl Read) {
    loop {
        match next(&mut from) {
            Ok(Said::Event(Event::Ready { .. })) => vm.ready(),
            Ok(Said::Event(Event::Failed { message })) => {
                let message: String = message.chars().take(500).collect();
                vm.errors.line(format!("the agent failed: {message}"));
                vm.decide_end(EndReason::BootFailed, "the guest's agent could not set the guest up");
            }
            Ok(Said::Event(Event::Exited { code, signal })) => exited(vm, code, signal),
            Ok(Said::Printed) => {}
            Err(error) => {
                if error.kind() != io::ErrorKind::UnexpectedEof {
                    vm.errors.line(format!("the agent's channel: {error}"));
                }
                let _ = io::copy(&mut from, &mut io::sink());
                return;
            }
        }
    }
}

enum Said {
    Event(Event),
    Printed,
}

fn next(from: &mut impl Read) -> io::Result<Said> {
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
        Kind::Event => serde_json::from_slice(&bytes[1..]).map(Said::Event).map_err(io::Error::other),
        Kind::Stdout | Kind::Stderr => Ok(Said::Printed),
        other => Err(io::Error::other(format!("a {other:?} frame"))),
    }
}

/// The program's end is the VM's: the agent sees to that, or the monitor when it takes too long.
fn exited(vm: &Arc<Vm>, code: i32, signal: Option<i32>) {
    let message = match signal {
        None => format!("the program ended with exit code {code}"),
        Some(signal) => format!("the program was ended by signal {signal}"),
    };
    vm.engine_log.line(&message);
    vm.note_exit(EndReport { reason: EndReason::Exited, message, exit_code: Some(code) });
    let of = Arc::clone(vm);
    let thread = thread::Builder::new().name("exited".into()).stack_size(64 * 1024);
    let spawned = thread.spawn(move || {
        let waiter = of.waiter();
        if waiter.wait(Some(Instant::now() + LAST_STEPS)).is_none() {
            of.engine_log.line("the guest did not end with its program: killed");
            of.kill_all();
        }
    });
    if let Err(error) = spawned {
        vm.errors.line(format!("waiting for the guest's end: {error}"));
    }
}
