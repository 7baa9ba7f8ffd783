//! What was run in VMs: noted as it ends, read by whoever may see the VM.

use std::{sync::Arc, time::Instant};

use tiffin_store::{ExecKind, ExecLog, ExecOutcome};
use tiffin_types::{account::Scope, id::VmId, time::Timestamp};

use super::{App, auth::Caller, journal::performer, vms::vm_get};
use crate::error::AppError;

/// So many bytes of a command are noted, where commands are noted at all.
const COMMAND_BYTES: usize = 1024;

/// A VM's newest runs, newest first.
pub(crate) async fn exec_log_list(
    app: &App,
    caller: &Caller,
    id: &VmId,
    limit: u32,
    kind: Option<ExecKind>,
) -> Result<Vec<ExecLog>, AppError> {
    caller.require(Scope::Read)?;
    vm_get(app, caller, id).await?;
    Ok(app.store.exec_log_list(id, limit, kind).await?)
}

/// A run that goes on. Dropped before its end is told, it is noted as abandoned: the client hung up.
pub(crate) struct RunNote {
    app: Arc<App>,
    began: Instant,
    run: Option<ExecLog>,
}

impl RunNote {
    /// Something is run in a VM that the caller may use. `command` is noted only where the configuration wants it.
    pub(crate) fn begin(app: &Arc<App>, caller: &Caller, vm: &VmId, kind: ExecKind, command: &str) -> Self {
        let command = app.config.exec.log_commands.then(|| shortened(command));
        let run = ExecLog {
            id: String::new(),
            vm_id: vm.clone(),
            at: Timestamp::now(),
            kind,
            outcome: ExecOutcome::Abandoned,
            exit_code: None,
            duration_ms: 0,
            truncated: false,
            actor: performer(Some(caller)),
            request_id: caller.request_id.as_deref().map(str::to_owned),
            command,
        };
        Self { app: Arc::clone(app), began: Instant::now(), run: Some(run) }
    }

    /// What beginning it came to.
    pub(crate) fn started<T, E>(&mut self, outcome: Result<T, E>) -> Result<T, E> {
        if outcome.is_err() {
            self.failed();
        }
        outcome
    }

    /// It ended, by itself or at its time limit.
    pub(crate) fn ended(&mut self, exit_code: i32, timed_out: bool, truncated: bool) {
        if let Some(run) = &mut self.run {
            run.outcome = if timed_out { ExecOutcome::TimedOut } else { ExecOutcome::Exited };
            (run.exit_code, run.truncated) = (Some(exit_code), truncated);
        }
        self.write();
    }

    /// It could not be run to its end.
    pub(crate) fn failed(&mut self) {
        if let Some(run) = &mut self.run {
            run.outcome = ExecOutcome::Failed;
        }
        self.write();
    }

    fn write(&mut self) {
        if let Some(mut run) = self.run.take() {
            run.duration_ms = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
            self.app.journal.note_run(run);
        }
    }
}

impl Drop for RunNote {
    fn drop(&mut self) {
        self.write();
    }
}

fn shortened(command: &str) -> String {
    let end = (0..=COMMAND_BYTES.min(command.len())).rev().find(|at| command.is_char_boundary(*at)).unwrap_or(0);
    // A text with NUL is none for every database.
    command[..end].replace('\0', "")
}
