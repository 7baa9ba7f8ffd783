//! Programs of fake VMs: scripted by their words, or by the test while they run.

use std::{path::PathBuf, sync::Arc, time::Duration};

use tiffin_logs::{Limits, Stream, Writer};
use tiffin_types::{
    id::VmId,
    time::Timestamp,
    vm::{EndReason, EndReport},
};

use super::{Call, Fake, Phase, Shared, State};
use crate::{Ended, EngineError};

/// What a program does.
#[derive(Debug, Clone, Default)]
pub struct FakeProgram {
    /// What it prints at once, in order.
    pub prints: Vec<(Printed, Vec<u8>)>,
    /// The exit code that it ends with; without one it runs until it is stopped.
    pub exit_code: Option<i32>,
    /// How long it runs before that.
    pub delay: Duration,
    /// Why it can't be started, with the exit code that goes with it.
    pub refused: Option<(String, i32)>,
}

/// Which of its outputs a program prints to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Printed {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Fake {
    /// What the program whose words, put together by spaces, are `words` does in every guest. Any other runs silently until
    /// it is stopped.
    pub fn program(&self, words: &str, does: FakeProgram) {
        self.lock().programs.insert(words.to_owned(), does);
    }

    /// The VM's program prints. Nothing when it doesn't run.
    pub fn print(&self, id: &VmId, stream: Printed, bytes: &[u8]) {
        self.lock().print(id, stream, bytes);
    }

    /// Keeps what programs print from now on as a real engine does: as lines below `folder`, by the VM's id.
    pub fn set_logs(&self, folder: impl Into<PathBuf>) {
        self.lock().logs = Some(folder.into());
    }

    /// All that the VM's programs have printed, gone VMs' too.
    pub fn printed(&self, id: &VmId) -> Vec<(Printed, Vec<u8>)> {
        self.lock().printed.get(id).cloned().unwrap_or_default()
    }

    /// Whether the VM's program runs, or stands still with its VM.
    pub fn program_runs(&self, id: &VmId) -> bool {
        self.lock().vms.get(id).is_some_and(|vm| vm.program_runs)
    }

    /// The VM's program ends by itself, and the VM with it. Nothing when it doesn't run.
    pub fn exit_program(&self, id: &VmId, code: i32) {
        self.shared.exit(id, code);
    }
}

impl From<Printed> for Stream {
    fn from(printed: Printed) -> Self {
        match printed {
            Printed::Stdout => Stream::Stdout,
            Printed::Stderr => Stream::Stderr,
        }
    }
}

impl State {
    fn print(&mut self, id: &VmId, stream: Printed, bytes: &[u8]) {
        if self.vms.get(id).is_some_and(|vm| vm.program_runs) {
            self.printed.entry(id.clone()).or_default().push((stream, bytes.to_vec()));
            let Some(logs) = &self.logs else { return };
            let open = || Writer::open(logs.join(id.as_str()), Limits::default());
            let writer = self.log_writers.entry(id.clone()).or_insert_with(open);
            writer.push(stream.into(), bytes, Timestamp::now());
        }
    }
}

impl State {
    /// The program prints no more.
    pub(super) fn close_log(&mut self, id: &VmId) {
        if let Some(mut writer) = self.log_writers.remove(id) {
            writer.finish(Timestamp::now());
        }
    }
}

impl Shared {
    fn exit(&self, id: &VmId, code: i32) {
        let report = EndReport {
            reason: EndReason::Exited,
            message: format!("the program ended with exit code {code}"),
            exit_code: Some(code),
        };
        let mut state = self.lock();
        if let Some(vm) = state.vms.get_mut(id).filter(|vm| vm.program_runs) {
            vm.end_with(report.clone());
            state.ends.push_back(Ended { id: id.clone(), report });
            state.close_log(id);
        }
        self.ended.notify_waiters();
    }

    /// Starts the program; gives what it does, unless it ran already.
    fn begin_program(&self, id: &VmId) -> Result<Option<FakeProgram>, EngineError> {
        let mut state = self.lock();
        state.fails(Call::ProgramStart)?;
        let vm = state.exclusive(id)?;
        let Some(program) = &vm.spec.program else { return Err(EngineError::Invalid("the VM has no program".into())) };
        let words = program.argv.join(" ");
        match vm.phase {
            Phase::Running if vm.program_runs => return Ok(None),
            Phase::Running => {}
            Phase::Starting => return Err(EngineError::WrongState("starting")),
            Phase::Paused => return Err(EngineError::WrongState("paused")),
            Phase::Stopped => return Err(EngineError::WrongState("stopped")),
        }
        let does = state.programs.get(&words).cloned().unwrap_or_default();
        let vm = state.exclusive(id)?;
        if let Some((message, code)) = &does.refused {
            let (reason, message, exit_code) = (EndReason::ProgramFailed, message.clone(), Some(*code));
            vm.end_with(EndReport { reason, message: message.clone(), exit_code });
            return Err(EngineError::Ended(EndReport { reason, message, exit_code }));
        }
        vm.program_runs = true;
        for (stream, bytes) in &does.prints {
            state.print(id, *stream, bytes);
        }
        Ok(Some(does))
    }
}

/// See [`crate::Engine::program_start`].
pub(super) async fn start(fake: &Fake, id: &VmId) -> Result<(), EngineError> {
    fake.shared.pass(Call::ProgramStart).await;
    let Some(does) = fake.shared.begin_program(id)? else { return Ok(()) };
    let Some(code) = does.exit_code else { return Ok(()) };
    let run = fake.lock().vms.get(id).map(|vm| vm.run.clone());
    let (Some(run), shared, id) = (run, Arc::clone(&fake.shared), id.clone()) else { return Ok(()) };
    fake.tasks.spawn(async move {
        let ends = async {
            tokio::time::sleep(does.delay).await;
            shared.exit(&id, code);
        };
        run.run_until_cancelled(ends).await
    });
    Ok(())
}
