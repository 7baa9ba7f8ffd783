//! Pausing the guest and letting it go on: by the sandbox's own socket, which takes no time, or by the engine's tool where that
//! isn't there.
//!
//! A guest that is held ([`hold`]) stands still for a moment. One that is paused may stand still for days: its sandbox, which
//! would wake a thousand times a second to see that there is nothing to do, is stopped as well. Whatever needs the sandbox
//! meanwhile wakes it ([`Awake`]); the guest goes on standing still.
//!
//! A tool that fails may have done its work before. So what holds is found out: a guest whose agent answers runs. One that
//! neither runs nor can be made to is ended: it must not stand still for ever, shown as running.

use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use serde_json::json;
use tiffin_types::vm::EndReason;

use super::{agent, machine, state::Vm};
use crate::{
    gvisor::{
        self,
        control::{self, ControlError},
    },
    host::process::{self, ToolError},
};

/// How long the tool has for one that isn't busy.
pub(super) const QUICK: Duration = Duration::from_secs(20);

/// Pauses a guest that runs, for as long as it may be. When it fails, the guest runs, or has been ended.
pub(super) fn pause(vm: &Vm) -> Result<(), String> {
    if vm.launch.machine.is_some() {
        // Its clock stands still with it: it is told the time when it goes on.
        vm.owe_news(true);
        return machine::ask(vm, "stop", &json!({})).map_err(|e| e.to_string());
    }
    vm.set_held(Some(hold(vm)?));
    signal(vm, Signal::SIGSTOP);
    Ok(())
}

/// Lets a paused guest go on. When it fails, nothing is known to have changed.
pub(super) fn resume(vm: &Vm, within: Duration) -> Result<(), String> {
    if vm.launch.machine.is_some() {
        return machine::ask(vm, "cont", &json!({})).map_err(|e| e.to_string());
    }
    signal(vm, Signal::SIGCONT);
    let resumed = match vm.held() {
        Some(Held::BySocket) => resume_by_socket(vm, within).map_err(|e| e.to_string()),
        Some(Held::ByTool) | None => resume_by_tool(vm, within).map_err(|e| e.to_string()),
    };
    if resumed.is_ok() {
        vm.set_held(None);
    }
    resumed
}

/// The sandbox of a paused guest, awake until this is dropped.
pub(super) struct Awake<'a>(&'a Vm);

impl<'a> Awake<'a> {
    /// Wakes it.
    pub(super) fn of(vm: &'a Vm) -> Self {
        signal(vm, Signal::SIGCONT);
        Self(vm)
    }
}

impl Drop for Awake<'_> {
    fn drop(&mut self) {
        signal(self.0, Signal::SIGSTOP);
    }
}

/// To the sandbox alone. One that isn't known yet, or is gone, needs none.
fn signal(vm: &Vm, signal: Signal) {
    if let Some(sandbox) = vm.sandbox.get() {
        let _ = kill(*sandbox, signal);
    }
}

fn pause_by_tool(vm: &Vm) -> Result<(), ToolError> {
    let paused = process::run_within(vm.with_paths(gvisor::pause), "", QUICK);
    if let Err(error) = &paused
        && !matches!(error, ToolError::Start { .. })
    {
        vm.errors.line(error.to_string());
        go_on_or_end(vm, QUICK);
    }
    paused.map(drop)
}

fn resume_by_tool(vm: &Vm, within: Duration) -> Result<(), ToolError> {
    match process::run_within(vm.with_paths(gvisor::resume), "", within) {
        Err(_) if agent::answers(vm) => Ok(()),
        resumed => resumed.map(drop),
    }
}

/// By what a guest stands still. The tool keeps its own account of what it paused, so the same lets it go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Held {
    BySocket,
    ByTool,
}

/// Has a guest that runs stand still, for a moment: [`let_go`] must follow. When it fails, the guest runs, or has been
/// ended; the text is for the engine's log.
pub(super) fn hold(vm: &Vm) -> Result<Held, String> {
    match vm.with_paths(|paths| control::pause(paths.state, QUICK)) {
        Ok(()) => Ok(Held::BySocket),
        // Nothing was done: a release that has another socket, or other words.
        Err(error @ (ControlError::Unreached(_) | ControlError::Refused(_))) => {
            vm.engine_log.line(format!("{error}: its tool pauses the guest instead"));
            pause_by_tool(vm).map(|()| Held::ByTool).map_err(|e| e.to_string())
        }
        Err(error @ ControlError::Unclear(_)) => {
            if !agent::answers(vm) {
                let_go(vm, Held::BySocket, QUICK);
            }
            Err(error.to_string())
        }
    }
}

/// Lets a guest go on that was held, or ends it.
pub(super) fn let_go(vm: &Vm, held: Held, within: Duration) {
    match held {
        Held::ByTool => go_on_or_end(vm, within),
        Held::BySocket => {
            if let Err(error) = resume_by_socket(vm, within) {
                end(vm, &error.to_string());
            }
        }
    }
}

/// It is asked once: a pause and a resume are counted, and one resume too many is the sandbox's end.
fn resume_by_socket(vm: &Vm, within: Duration) -> Result<(), ControlError> {
    let resume = || vm.with_paths(|paths| control::resume(paths.state, within));
    let resumed = match resume() {
        Err(ControlError::Unreached(_)) => resume(),
        resumed => resumed,
    };
    match resumed {
        Err(_) if agent::answers(vm) => Ok(()),
        resumed => resumed,
    }
}

/// Lets a guest go on that the tool has paused, or ends it.
fn go_on_or_end(vm: &Vm, within: Duration) {
    let resumed = match resume_by_tool(vm, within) {
        Err(ToolError::Start { .. } | ToolError::Failed { .. }) => resume_by_tool(vm, within),
        resumed => resumed,
    };
    if let Err(error) = resumed {
        end(vm, &error.to_string());
    }
}

/// Ends a guest that can't go on.
pub(super) fn end(vm: &Vm, error: &str) {
    vm.errors.line(format!("the guest doesn't go on: {error}"));
    if vm.stop_requested() {
        // It ends by itself, or by whoever asked: that is its end's reason.
        return;
    }
    vm.decide_end(EndReason::EngineLost, "the VM stood still, and the engine could not let it go on");
}
