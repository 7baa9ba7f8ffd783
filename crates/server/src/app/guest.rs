//! The way to the agent in a VM: bounded in number and time, and what its failures mean to a client.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use serde_json::json;
use tiffin_engine::{Connection, EngineError, Observed, Target, agent::AgentError};
use tiffin_protocol::FailureCode;
use tiffin_store::Vm;
use tiffin_types::{
    id::VmId,
    vm::{EndReport, VmState},
};

use super::{
    App,
    auth::Caller,
    images::environment_of,
    places::CommandPlace,
    vms::{vm_get, wrong_state},
};
use crate::{error::AppError, reconcile};

/// What clients do in VMs is done by this user and group.
pub(super) const GUEST_USER: u32 = 1000;
/// How long reaching the agent may take.
const DIAL: Duration = Duration::from_secs(5);
/// How much longer than the agent's own limit its answer may take.
pub(super) const SLACK: Duration = Duration::from_secs(5);
/// How long an end may take to be noticed after the guest has hung up.
const NOTICE: Duration = Duration::from_secs(2);
const NOTICE_POLL: Duration = Duration::from_millis(50);
/// So much of what an agent says is shown.
const MESSAGE_CHARS: usize = 500;

/// A VM in which something of a client's goes on, until it is dropped.
pub(super) struct Guest {
    app: Arc<App>,
    pub(super) vm: Vm,
    _place: CommandPlace,
}

/// The way to the agent of one of the caller's VMs, if that runs and has a place left.
pub(super) async fn reach(app: &Arc<App>, caller: &Caller, id: &VmId) -> Result<(Guest, Connection, String), AppError> {
    let vm = vm_get(app, caller, id).await?;
    if vm.state != VmState::Running {
        return Err(wrong_state(&vm, "RUNNING"));
    }
    let place = app.commands.take(id)?;
    let guest = Guest { app: Arc::clone(app), vm, _place: place };
    match tokio::time::timeout(DIAL, dial(app, id)).await {
        Ok(Ok((connection, token))) => Ok((guest, connection, token)),
        Ok(Err(error)) => Err(guest.unreachable(error).await),
        Err(_) => Err(AppError::AgentTimeout),
    }
}

async fn dial(app: &App, id: &VmId) -> Result<(Connection, String), EngineError> {
    let token = app.engine.agent_token(id).await?;
    Ok((app.engine.dial(id, Target::Agent).await?, token))
}

impl Guest {
    /// What the VM's image has its commands find in their environment.
    pub(super) async fn image_env(&self) -> Result<BTreeMap<String, String>, AppError> {
        environment_of(&self.app, &self.vm).await
    }

    /// What begins an operation, which may take no longer than reaching the agent.
    pub(super) async fn begin<T>(&self, operation: impl Future<Output = Result<T, AgentError>>) -> Result<T, AppError> {
        match tokio::time::timeout(DIAL, operation).await {
            Ok(Ok(begun)) => Ok(begun),
            Ok(Err(error)) => Err(self.failure(error).await),
            Err(_) => Err(AppError::AgentTimeout),
        }
    }

    /// Why the agent could not be reached: mostly as the VM has just ended.
    async fn unreachable(&self, error: EngineError) -> AppError {
        match error {
            EngineError::Absent | EngineError::WrongState(_) | EngineError::Host { .. } => {
                self.ended().await.unwrap_or_else(|| AppError::Agent(Box::new(error)))
            }
            other => other.into(),
        }
    }

    /// What a failure of an operation means.
    pub(super) async fn failure(&self, error: AgentError) -> AppError {
        match error {
            AgentError::Refused(failure) => match failure.code {
                FailureCode::BadCwd => AppError::field("cwd", "must be an existing directory in the VM"),
                FailureCode::BadCommand => {
                    AppError::Unprocessable { code: "bad_command", message: shown(&failure.message) }
                }
                FailureCode::NoRoom => AppError::Unprocessable {
                    code: "guest_full",
                    message: "the VM has no room for another process: end some of its processes".into(),
                },
                FailureCode::NoSpace => AppError::Unprocessable {
                    code: "guest_disk_full",
                    message: "the VM's disk is full: remove files, or make a VM with a larger diskSizeMb".into(),
                },
                FailureCode::NotFound => AppError::FileNotFound(shown(&failure.message)),
                FailureCode::Forbidden => AppError::field("path", shown(&failure.message)),
                FailureCode::BadArchive => AppError::BadArchive(shown(&failure.message)),
                FailureCode::TooLarge => AppError::OverLimit(shown(&failure.message)),
                FailureCode::TimedOut => AppError::FilesTimeout,
                FailureCode::Unauthorized | FailureCode::BadRequest | FailureCode::BadUser | FailureCode::Internal => {
                    AppError::Agent(failure.message.into())
                }
            },
            AgentError::TimedOut => AppError::AgentTimeout,
            AgentError::RequestTooLarge => AppError::BadRequest(
                "the request is too large for the VM's agent: send less, or fewer control characters".into(),
            ),
            AgentError::Protocol(_) | AgentError::OutputTooLarge => AppError::Agent(Box::new(error)),
            AgentError::Lost(_) => self.ended().await.unwrap_or_else(|| AppError::Agent(Box::new(error))),
        }
    }

    /// The conflict to answer with when the VM has ended, as is mostly the case when the agent is suddenly gone.
    async fn ended(&self) -> Option<AppError> {
        let (app, vm) = (&self.app, &self.vm);
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
}

/// What comes from a guest, as a line of bounded length.
pub(super) fn shown(message: &str) -> String {
    message.chars().take(MESSAGE_CHARS).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}
