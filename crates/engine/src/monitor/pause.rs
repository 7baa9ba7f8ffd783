//! Pausing the guest and letting it go on, by the engine's tool.
//!
//! A tool that fails may have done its work before. So what holds is found out: a guest whose agent answers runs. One that
//! neither runs nor can be made to is ended: it must not stand still for ever, shown as running.

use std::time::Duration;

use tiffin_types::vm::EndReason;

use super::{agent, state::Vm};
use crate::{
    gvisor,
    host::process::{self, ToolError},
};

/// How long the tool has for one that isn't busy.
pub(super) const QUICK: Duration = Duration::from_secs(20);

/// Pauses a guest that runs. When it fails, the guest runs, or has been ended.
pub(super) fn pause(vm: &Vm) -> Result<(), ToolError> {
    let paused = process::run_within(vm.with_paths(gvisor::pause), "", QUICK);
    if let Err(error) = &paused
        && !matches!(error, ToolError::Start { .. })
    {
        vm.errors.line(error.to_string());
        go_on_or_end(vm, QUICK);
    }
    paused.map(drop)
}

/// Lets a paused guest go on. When it fails, nothing is known to have changed.
pub(super) fn resume(vm: &Vm, within: Duration) -> Result<(), ToolError> {
    match process::run_within(vm.with_paths(gvisor::resume), "", within) {
        Err(_) if agent::answers(vm) => Ok(()),
        resumed => resumed.map(drop),
    }
}

/// Lets a guest go on that ran before, or ends it.
pub(super) fn go_on_or_end(vm: &Vm, within: Duration) {
    let resumed = match resume(vm, within) {
        Err(ToolError::Start { .. } | ToolError::Failed { .. }) => resume(vm, within),
        resumed => resumed,
    };
    let Err(error) = resumed else { return };
    vm.errors.line(format!("the guest doesn't go on: {error}"));
    if vm.stop_requested() {
        // It ends by itself, or by whoever asked: that is its end's reason.
        return;
    }
    vm.decide_end(EndReason::EngineLost, "the VM stood still, and the engine could not let it go on");
}
