//! Commands in VMs, by the agent in the guest.
//!
//! Invariants: whatever the guest does, a command is over at its own deadline; dropping a [`Running`] kills its command.
//! Neither command lines nor environments are logged.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::json;
use tiffin_engine::{
    Connection, EngineError, Observed, Target,
    agent::{self, AgentError, ExecItem, ExecStream},
};
use tiffin_protocol::{Command, Exec, ExecDone, FailureCode};
use tiffin_store::Vm;
use tiffin_types::{
    account::Scope,
    id::VmId,
    limits::EXEC_OUTPUT_BYTES,
    vm::{EndReport, VmState},
};

use super::{
    App,
    auth::Caller,
    places::CommandPlace,
    vms::{vm_get, wrong_state},
};
use crate::{error::AppError, metrics, reconcile};

/// Commands run as this user and group.
const GUEST_USER: u32 = 1000;
/// How long reaching the agent may take.
const DIAL: Duration = Duration::from_secs(5);
/// How much longer than the command's own limit its answer may take.
const SLACK: Duration = Duration::from_secs(5);
/// How long an end may take to be noticed after the guest has hung up.
const NOTICE: Duration = Duration::from_secs(2);
const NOTICE_POLL: Duration = Duration::from_millis(50);

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
}

/// A command that runs.
pub(crate) struct Running {
    app: Arc<App>,
    vm: Vm,
    stream: ExecStream,
    began: Instant,
    deadline: tokio::time::Instant,
    _place: CommandPlace,
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
    let vm = vm_get(app, caller, id).await?;
    if vm.state != VmState::Running {
        return Err(wrong_state(&vm, "RUNNING"));
    }
    let place = app.commands.take(id)?;
    let deadline = tokio::time::Instant::now() + Duration::from_millis(request.timeout_ms) + SLACK;
    let (connection, token) = match tokio::time::timeout(DIAL, dial(app, id)).await {
        Ok(Ok(reached)) => reached,
        Ok(Err(error)) => return Err(unreachable(app, &vm, error).await),
        Err(_) => return Err(AppError::AgentTimeout),
    };
    let exec = Exec {
        command: Command::Shell(request.cmd),
        cwd: request.cwd,
        env: request.env,
        uid: GUEST_USER,
        gid: GUEST_USER,
        timeout_ms: request.timeout_ms,
        stdout_cap: EXEC_OUTPUT_BYTES as u64,
        stderr_cap: EXEC_OUTPUT_BYTES as u64,
        stdin: false,
        terminal: None,
    };
    let stream = match tokio::time::timeout(DIAL, agent::exec(connection, &token, exec)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return Err(failure(app, &vm, error).await),
        Err(_) => return Err(AppError::AgentTimeout),
    };
    Ok(Running { app: Arc::clone(app), vm, stream, began, deadline, _place: place })
}

impl Running {
    /// The next piece of output, or the end, after which nothing may be asked.
    pub(crate) async fn next(&mut self) -> Result<ExecItem, AppError> {
        match tokio::time::timeout_at(self.deadline, self.stream.next()).await {
            Ok(Ok(item)) => {
                if let ExecItem::Done(done) = &item {
                    metrics::exec(self.began.elapsed(), Duration::from_micros(done.duration_us));
                }
                Ok(item)
            }
            Ok(Err(error)) => Err(failure(&self.app, &self.vm, error).await),
            Err(_) => Err(AppError::AgentTimeout),
        }
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
                ExecItem::Done(done) => return Ok(ExecOutput { stdout, stderr, done }),
            }
        }
    }
}

async fn dial(app: &App, id: &VmId) -> Result<(Connection, String), EngineError> {
    let token = app.engine.agent_token(id).await?;
    Ok((app.engine.dial(id, Target::Agent).await?, token))
}

/// Why the agent could not be reached: mostly as the VM has just ended.
async fn unreachable(app: &Arc<App>, vm: &Vm, error: EngineError) -> AppError {
    match error {
        EngineError::Absent | EngineError::WrongState(_) | EngineError::Host { .. } => {
            ended(app, vm).await.unwrap_or_else(|| AppError::Agent(Box::new(error)))
        }
        other => other.into(),
    }
}

async fn failure(app: &Arc<App>, vm: &Vm, error: AgentError) -> AppError {
    match error {
        AgentError::Refused(failure) => match failure.code {
            FailureCode::BadCwd => AppError::field("cwd", "must be an existing directory in the VM"),
            FailureCode::BadCommand => AppError::Unprocessable { code: "bad_command", message: failure.message },
            FailureCode::NoRoom => AppError::Unprocessable {
                code: "guest_full",
                message: "the VM has no room for another process: end some of its processes".into(),
            },
            FailureCode::Unauthorized
            | FailureCode::BadRequest
            | FailureCode::Internal
            | FailureCode::NotFound
            | FailureCode::Forbidden
            | FailureCode::BadArchive
            | FailureCode::TooLarge
            | FailureCode::NoSpace
            | FailureCode::TimedOut => AppError::Agent(failure.message.into()),
        },
        AgentError::TimedOut => AppError::AgentTimeout,
        AgentError::RequestTooLarge => AppError::BadRequest(
            "the request is too large for the VM's agent: send less, or fewer control characters".into(),
        ),
        AgentError::Protocol(_) | AgentError::OutputTooLarge => AppError::Agent(Box::new(error)),
        AgentError::Lost(_) => ended(app, vm).await.unwrap_or_else(|| AppError::Agent(Box::new(error))),
    }
}

/// The conflict to answer with when the VM has ended, as is mostly the case when the agent is suddenly gone.
async fn ended(app: &Arc<App>, vm: &Vm) -> Option<AppError> {
    let noticed = async {
        while matches!(app.engine.observe(&vm.id).await, Observed::Running | Observed::Unknown) {
            tokio::time::sleep(NOTICE_POLL).await;
        }
        reconcile::vm_reconcile(app, vm, None).await
    };
    if let Ok(Err(error)) = tokio::time::timeout(NOTICE, noticed).await {
        tracing::warn!(vm_id = %vm.id, error = error.inside(), "the end of VM {} can't be recorded", vm.id);
    }
    let now = app.store.vm_get(&vm.account_id, &vm.id).await.ok().flatten()?;
    if now.state == VmState::Deleted {
        return Some(AppError::NotFound("VM"));
    }
    let why = now.end.as_ref().map_or("it is going down", |end: &EndReport| end.message.as_str());
    (now.state != VmState::Running).then(|| AppError::Conflict {
        code: "vm_ended",
        message: format!("the VM ended while the command ran and is {} now: {why}", now.state),
        details: json!({ "state": now.state, "reason": now.end.as_ref().map(|end| end.reason) }),
    })
}
