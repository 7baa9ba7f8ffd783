//! One connection: one request, one answer.
//!
//! Invariant: exactly one last frame, `Done` or `Failed`, unless the host has closed the connection or was too slow.

use std::net::{Shutdown as Direction, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::sys::socket::{setsockopt, sockopt};
use serde_json::json;
use tiffin_protocol::{Boot, Failure, FailureCode, Kind, Op, Pong, Renew, encode};

use crate::callers::Callers;
use crate::exec::{self, Ended, Guest};
use crate::handover::Handover;
use crate::identity::{Current, Identity};
use crate::jobs::Jobs;
use crate::program::Program;
use crate::reaper::Reaper;
use crate::renew::Renewal;
use crate::request::{failure, parse};
use crate::wire::{First, WireError, read_first, write_all};
use crate::{files, script};

/// How long a request may take to arrive.
pub const REQUEST_LIMIT: Duration = Duration::from_secs(10);

/// How long the host may take to accept an answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// How long the host may take to close after the guest's last answer.
const FAREWELL_LIMIT: Duration = Duration::from_millis(500);

/// What every connection shares.
#[derive(Debug)]
pub struct Service {
    identity: Current,
    /// Held while the guest becomes another: one change after the other.
    renewing: Mutex<()>,
    callers: Callers,
    guest: Arc<Guest>,
    handover: Option<Handover>,
    program: Arc<Program>,
}

impl Service {
    /// The service of a guest that was booted by `boot`. Without a handover it can't run scripts or move files.
    pub fn new(boot: Boot, jobs: Jobs, reaper: Arc<Reaper>, handover: Option<Handover>, program: Arc<Program>) -> Self {
        Service {
            identity: Current::new(boot.into()),
            renewing: Mutex::default(),
            callers: Callers::default(),
            guest: Arc::new(Guest::new(jobs, reaper)),
            handover,
            program,
        }
    }

    /// Keeps a shell waiting for the next command.
    pub fn park_shells(&self) {
        exec::park::keep(&self.guest);
    }

    /// Who the guest is at this moment.
    pub fn identity(&self) -> Arc<Identity> {
        self.identity.get()
    }

    /// Serves one connection to its end.
    pub fn serve(&self, socket: &Arc<TcpStream>) {
        // Before its token is looked at: whom the old one lets in is noted by the time that it no longer holds.
        let _entered = self.callers.enter(socket);
        // Output goes out as it comes; a socket that refuses this is only slower.
        let _ = setsockopt(&**socket, sockopt::TcpNoDelay, &true);
        let first = match read_first(socket, Instant::now() + REQUEST_LIMIT) {
            Ok(first) => first,
            Err(error @ (WireError::Frame(_) | WireError::Late)) => {
                return fail(socket, &failure(FailureCode::BadRequest, &error.to_string()));
            }
            Err(WireError::Closed | WireError::Socket(_)) => return,
        };
        match parse(first.kind, &first.payload, &self.identity().token) {
            Ok(op) => self.run(op, socket, first),
            Err(refused) => fail(socket, &refused),
        }
    }

    fn run(&self, op: Op, socket: &TcpStream, first: First) {
        match op {
            Op::Ping => answer(socket, &self.pong()),
            Op::Exec(command) => conclude(socket, exec::run(&self.guest, &command, socket, first.rest)),
            Op::Script(script) => match &self.handover {
                Some(handover) => conclude(socket, script::run(&self.guest, handover, &script, socket, first.rest)),
                None => fail(socket, &no_handover()),
            },
            Op::Files(files) => match &self.handover {
                Some(handover) => conclude(socket, files::run(&self.guest, handover, &files, socket, first.rest)),
                None => fail(socket, &no_handover()),
            },
            Op::Program(program) => match self.program.start(&self.guest, &program) {
                Ok(started) => answer(socket, &started),
                Err(refused) => fail(socket, &refused),
            },
            Op::Renew(renew) => match self.renew(renew, socket) {
                Ok(()) => answer(socket, &self.pong()),
                Err(refused) => fail(socket, &refused),
            },
            Op::Shutdown(shutdown) => {
                self.guest.park.close(&self.guest);
                self.program.shut_down(Duration::from_millis(shutdown.grace_ms));
                answer(socket, &json!({}));
                farewell(socket);
                crate::shutdown::leave(0);
            }
        }
    }
}

impl Service {
    /// Becomes what `renew` says, which came by `own`.
    fn renew(&self, renew: Renew, own: &TcpStream) -> Result<(), Failure> {
        let renewal = Renewal::of(&renew)?;
        let _one = self.renewing.lock().unwrap_or_else(PoisonError::into_inner);
        let identity = Identity::from(renew.boot.clone());
        if renew.machine_id.is_none() && *self.identity() == identity {
            renewal.apply_to_same();
            return Ok(());
        }
        renewal.apply();
        let is_another = self.identity().token != identity.token;
        self.identity.replace(identity);
        if is_another {
            self.callers.hang_up_on_others(own);
        }
        // A shell that has started knows the old host name, and has the randomness of the snapshot.
        self.guest.park.discard(&self.guest);
        Ok(())
    }

    fn pong(&self) -> Pong {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let processes = crate::processes::count(&self.guest.reaper.hidden());
        Pong {
            version: crate::VERSION.to_owned(),
            unix_ms: i64::try_from(since_epoch.as_millis()).unwrap_or(i64::MAX),
            processes: u32::try_from(processes).unwrap_or(u32::MAX),
        }
    }
}

/// Answers what [`exec`] has left to be answered.
fn conclude(socket: &TcpStream, ended: Ended) {
    match ended {
        Ended::Answered | Ended::HostGone => {}
        Ended::Failed(failed) => fail(socket, &failed),
    }
}

fn no_handover() -> Failure {
    failure(FailureCode::Internal, "the guest has no folder for scripts' results and file operations' answers")
}

fn answer(socket: &TcpStream, value: &impl serde::Serialize) {
    send_last(socket, Kind::Done, value);
}

fn fail(socket: &TcpStream, failed: &Failure) {
    send_last(socket, Kind::Failed, failed);
}

fn send_last(socket: &TcpStream, kind: Kind, value: &impl serde::Serialize) {
    let Ok(payload) = serde_json::to_vec(value) else { return };
    // A host that is gone or doesn't read gets no answer.
    let _ = write_all(socket, &encode(kind, &payload), Instant::now() + ANSWER_LIMIT);
}

/// Waits until the host has seen the end: with the agent, the guest's network vanishes, and what it hasn't sent yet.
fn farewell(socket: &TcpStream) {
    let _ = socket.shutdown(Direction::Write);
    let _ = crate::wire::wait_closed(socket, Instant::now() + FAREWELL_LIMIT);
}
