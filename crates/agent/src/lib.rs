//! The guest agent: PID 1 in every guest. It sets the guest up, says that it is ready, and runs what the host asks for.
//!
//! ```text
//! monitor --stdin: Boot--> [boot] -> [guest] -> [jobs] -> [listen] --stdout: Event::Ready--> monitor
//! host ----TCP-----------> [listen] -> [connection] -> [request] -> [exec] | [program] | [renew] | [shutdown] | ping
//!                                                                     ^          |
//!                                                                     |          '--> [channel] --stdout--> monitor
//!                                        [reaper]: every exit --------+
//! ```
//!
//! Invariants
//! * Nothing that comes from the port or from standard input can panic it or make it allocate without a bound.
//! * Guest processes can't learn the token: it is in no environment, argument or file, the agent isn't dumpable, and
//!   connections from the guest's own addresses are closed unread.
//! * Commands inherit none of its descriptors, and none of the capabilities that would let root in the guest command it.
//! * One thread reaps; one thread serves each connection. All its signals stay blocked, so a guest can't end it.
//!
//! It deliberately has no async runtime, resolver or logger: it must be small and start at once. What goes wrong in
//! set-up is a line on standard error, and fatal only when it can't listen.

pub mod boot;
pub mod callers;
pub mod channel;
pub mod connection;
pub mod exec;
pub mod files;
pub mod guest;
pub mod handover;
pub mod identity;
pub mod init;
pub mod jobs;
pub mod limits;
pub mod links;
pub mod listen;
pub mod processes;
pub mod program;
pub mod reaper;
pub mod renew;
pub mod request;
pub mod script;
pub mod shutdown;
pub mod wire;

use std::process::ExitCode;
use std::sync::Arc;

use tiffin_protocol::Event;

/// The agent's version, as told in `Ready` and in answers to a ping.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Runs the agent; returns only when it can't go on. In a process that the agent has started for itself: does what that
/// is for.
pub fn run() -> ExitCode {
    let (word, job) = (std::env::args().nth(1), std::env::args().nth(2));
    if let (Some(files::tool::WORD), Some(job)) = (word.as_deref(), job) {
        return files::tool::main(&job);
    }
    // Shutting down signals every process that can be seen: only ever right where the agent is the first of them.
    if std::process::id() != 1 {
        eprintln!("tiffin-agent: it runs as process 1 of a guest only");
        return ExitCode::from(2);
    }
    if init::is_first() {
        let Err(error) = init::set_up_root();
        init::tell(&error);
        shutdown::leave_machine();
    }
    if word.as_deref() == Some(init::WORD) {
        init::note_bare();
    }
    let channel = match boot::take_over() {
        Ok(channel) => Arc::new(channel),
        Err(error) => {
            eprintln!("tiffin-agent: {error}");
            shutdown::leave(1);
        }
    };
    let Err(error) = serve(&channel);
    let message = error.to_string();
    eprintln!("tiffin-agent: {message}");
    channel.failed(&message);
    shutdown::leave(1)
}

fn serve(channel: &Arc<channel::Channel>) -> Result<std::convert::Infallible, boot::BootError> {
    let boot = boot::read(std::io::stdin().lock())?;
    guest::set_up(&boot);
    if let Some(link) = &boot.link {
        guest::report("the network", links::set_up(link));
    }
    guest::settle(boot.max_pids);
    boot::drop_stdin()?;
    limits::apply(boot.cpus);
    let jobs = jobs::Jobs::mount(boot.max_pids).unwrap_or_else(|error| {
        eprintln!("tiffin-agent: no process groups, limiting each user instead: {error}");
        limits::apply_processes(boot.max_pids);
        jobs::Jobs::absent()
    });
    let listener = listen::bind(tiffin_protocol::AGENT_PORT).map_err(boot::BootError::Listen)?;
    let reaper = reaper::Reaper::start().map_err(boot::BootError::Thread)?;
    let handover = handover::Handover::set_up(&script::PRELUDES)
        .inspect_err(|error| eprintln!("tiffin-agent: no scripts and no file operations: {error}"));
    let program = program::Program::new(Arc::clone(channel));
    let service = connection::Service::new(boot, jobs, reaper, handover.ok(), program);
    channel.event(&Event::Ready { version: VERSION.to_owned() });
    service.park_shells();
    listen::serve_forever(listener, service)
}
