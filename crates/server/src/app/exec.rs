//! Commands in VMs, by the agent in the guest.
//!
//! Invariants: whatever the guest does, a command is over at its own deadline; dropping a [`Running`] kills its command.
//! Neither command lines nor environments are logged.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use tiffin_engine::agent::{self, ExecItem, ExecStream};
use tiffin_protocol::{Command, Exec, ExecDone, Outcome};
use tiffin_store::ExecKind;
use tiffin_types::{account::Scope, id::VmId, limits::EXEC_OUTPUT_BYTES};

use super::{
    App,
    auth::Caller,
    exec_logs::RunNote,
    guest::{GUEST_USER, Guest, SLACK, reach},
    scripts,
};
use crate::{error::AppError, metrics};

/// A command to run; its fields are within their ranges.
pub(crate) struct ExecRequest {
    pub(crate) cmd: String,
    pub(crate) cwd: String,
    pub(crate) env: BTreeMap<String, String>,
    pub(crate) timeout_ms: u64,
}

/// A command's whole output, and how it ended.
pub(crate) struct ExecOutput {
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) done: ExecDone,
    /// What a script said of itself; a command says nothing.
    pub(crate) outcome: Outcome,
}

/// A command, or a script, that runs.
pub(crate) struct Running {
    guest: Guest,
    stream: ExecStream,
    began: Instant,
    deadline: tokio::time::Instant,
    note: RunNote,
}

/// Starts a command.
pub(crate) async fn exec_start(
    app: &Arc<App>,
    caller: &Caller,
    id: &VmId,
    request: ExecRequest,
) -> Result<Running, AppError> {
    caller.require(Scope::Write)?;
    let began = Instant::now();
    let (guest, connection, token) = reach(app, caller, id).await?;
    let (timeout_ms, image_env) = (request.timeout_ms, guest.image_env().await?);
    let mut note = RunNote::begin(app, caller, id, ExecKind::Exec, &request.cmd);
    let exec = Exec {
        command: Command::Shell(request.cmd),
        cwd: request.cwd,
        env: request.env,
        image_env,
        uid: GUEST_USER,
        gid: GUEST_USER,
        timeout_ms,
        stdout_cap: EXEC_OUTPUT_BYTES as u64,
        stderr_cap: EXEC_OUTPUT_BYTES as u64,
        stdin: false,
        terminal: None,
    };
    let stream = note.started(guest.begin(agent::exec(connection, &token, exec)).await)?;
    Ok(Running::new(guest, note, stream, began, timeout_ms))
}

impl Running {
    /// What began at that moment and may take so long in the guest.
    pub(super) fn new(guest: Guest, note: RunNote, stream: ExecStream, began: Instant, timeout_ms: u64) -> Self {
        let deadline = tokio::time::Instant::now() + Duration::from_millis(timeout_ms) + SLACK;
        Self { guest, stream, began, deadline, note }
    }

    /// The next piece of output, or the end, after which nothing may be asked but the outcome.
    pub(crate) async fn next(&mut self) -> Result<ExecItem, AppError> {
        match tokio::time::timeout_at(self.deadline, self.stream.next()).await {
            Ok(Ok(item)) => {
                if let ExecItem::Done(done) = &item {
                    let truncated = done.stdout_truncated || done.stderr_truncated;
                    self.note.ended(done.exit_code, done.timed_out, truncated);
                    metrics::exec(self.began.elapsed(), Duration::from_micros(done.duration_us));
                }
                Ok(item)
            }
            Ok(Err(error)) => {
                self.note.failed();
                Err(self.guest.failure(error).await)
            }
            Err(_) => {
                self.note.failed();
                Err(AppError::AgentTimeout)
            }
        }
    }

    /// What a script that has ended said of itself.
    pub(crate) fn outcome(&mut self) -> Outcome {
        scripts::outcome(self.stream.take_result())
    }

    /// When the command is given up.
    pub(crate) fn deadline(&self) -> tokio::time::Instant {
        self.deadline
    }

    /// All output, bounded by the caps, and the end.
    pub(crate) async fn collect(mut self) -> Result<ExecOutput, AppError> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        loop {
            match self.next().await? {
                ExecItem::Stdout(bytes) => stdout.extend(bytes),
                ExecItem::Stderr(bytes) => stderr.extend(bytes),
                ExecItem::Done(done) => {
                    let outcome = self.outcome();
                    return Ok(ExecOutput { stdout, stderr, done, outcome });
                }
            }
        }
    }
}
