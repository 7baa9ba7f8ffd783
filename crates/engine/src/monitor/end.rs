//! The end of a guest: noticing it, naming its reason, and leaving the host clean.

use std::{
    fs, io,
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::wait::{WaitPidFlag, WaitStatus, waitpid},
    unistd::Pid,
};
use tiffin_types::vm::{EndReason, EndReport};

use super::{
    boot::on_host,
    launch::{self, END, MEMORY, Phase, RESTORE, SOCKET},
    state::Vm,
};
use crate::host::{filter, mount};

/// How often the kernel's count of memory kills is looked at.
const OOM_INTERVAL: Duration = Duration::from_millis(500);

/// How long killed processes may take to vanish.
const LAST_REAPED: Duration = Duration::from_secs(5);

/// Waits for the sandbox's end and says why it came.
pub(super) fn wait(vm: &Arc<Vm>, sandbox: Pid) -> EndReport {
    watch_memory(vm);
    let status = loop {
        match waitpid(sandbox, None) {
            Err(nix::errno::Errno::EINTR) => {}
            other => break other,
        }
    };
    vm.engine_log.line(format!("the sandbox ended: {status:?}"));
    // The reason may be among the guest's last words.
    vm.kill_all();
    reap_all(Instant::now() + LAST_REAPED);
    vm.hear_out();
    why(vm, status)
}

/// The kernel may kill a helper of the sandbox instead of the sandbox: over the limit, the VM ends either way.
fn watch_memory(vm: &Arc<Vm>) {
    let watched = Arc::clone(vm);
    let thread = thread::Builder::new().name("memory".into()).stack_size(64 * 1024);
    let spawned = thread.spawn(move || {
        loop {
            thread::sleep(OOM_INTERVAL);
            if watched.is_oom() {
                watched.decide_end(EndReason::Oom, oom_message(&watched));
                return;
            }
        }
    });
    if let Err(error) = spawned {
        vm.errors.line(format!("the memory's watcher: {error}"));
    }
}

fn oom_message(vm: &Vm) -> String {
    format!("the VM went over its memory limit of {} MiB", vm.launch.spec.size.mem_mb)
}

fn why(vm: &Vm, status: nix::Result<WaitStatus>) -> EndReport {
    let report = |reason, message: String| EndReport { reason, message, exit_code: None };
    if vm.is_oom() {
        return report(EndReason::Oom, oom_message(vm));
    }
    if let Some(verdict) = vm.verdict() {
        return verdict;
    }
    let exit = vm.exit();
    if vm.stop_requested() {
        let exit_code = exit.and_then(|exit| exit.exit_code);
        return EndReport { reason: EndReason::Requested, message: "stopped on request".into(), exit_code };
    }
    if let Some(exit) = exit {
        return exit;
    }
    match status {
        Ok(WaitStatus::Exited(_, 0)) if is_booting_machine(vm) => {
            report(EndReason::BootFailed, vm.words.explain("the guest's kernel ended before the guest was up"))
        }
        Ok(WaitStatus::Exited(..)) if is_booting_machine(vm) => report(
            EndReason::BootFailed,
            "the emulator could not boot the guest's kernel; its error log says why".into(),
        ),
        Ok(WaitStatus::Exited(_, code)) => {
            report(EndReason::AgentLost, format!("the agent in the guest ended (exit status {code})"))
        }
        Ok(WaitStatus::Signaled(_, signal, _)) => {
            report(EndReason::EngineLost, format!("the engine was killed by {signal}"))
        }
        Ok(_) | Err(_) => report(EndReason::EngineLost, "the engine is gone".into()),
    }
}

/// Whether it is a machine whose agent never said that it is ready.
fn is_booting_machine(vm: &Vm) -> bool {
    vm.launch.machine.is_some() && vm.phase() == Phase::Starting
}

/// Clears everything but the folder, records the end and tells everyone who waits.
pub(super) fn finish(vm: &Vm, report: EndReport) {
    vm.kill_all();
    reap_all(Instant::now() + LAST_REAPED);
    vm.hear_out();
    for name in ["root", "disk"] {
        if let Err(error) = unmount(&vm.scratch(name)) {
            vm.errors.line(format!("unmounting the {name}: {error}"));
        }
    }
    if let Err(error) = vm.group.remove() {
        vm.errors.line(format!("removing the control groups: {error}"));
    }
    if vm.uplink().is_some() {
        let closed = on_host(vm, || filter::close_host_wholly(&vm.launch.spec.id));
        if let Err(error) = closed {
            vm.errors.line(format!("closing the host's filter: {error}"));
        }
    }
    if let Err(error) = forget_memory(&vm.folder) {
        vm.errors.line(format!("removing the saved memory: {error}"));
    }
    vm.engine_log.line(format!("ended: {} ({})", report.reason.as_str(), report.message));
    if let Err(error) = launch::write(&vm.folder, END, &report, true) {
        vm.errors.line(format!("recording the end: {error}"));
    }
    vm.publish_end(report);
    // Nobody can ask any more; a socket that nobody serves would look like a monitor that hangs.
    let _ = launch::remove(&vm.folder, SOCKET);
}

/// Removes the memory that the guest was to go on from, unless it hasn't been tried.
pub(super) fn forget_memory(folder: &Path) -> io::Result<()> {
    if folder.join(RESTORE).exists() {
        return Ok(());
    }
    match fs::remove_dir_all(folder.join(MEMORY)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The mount of a process that has just been reaped may be busy for a moment.
fn unmount(at: &Path) -> io::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(3);
    loop {
        match mount::unmount(at) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(5));
            }
            other => return other,
        }
    }
}

/// Collects every process of the namespace, so that nothing holds a mount or a control group.
fn reap_all(deadline: Instant) {
    while Instant::now() < deadline {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => thread::sleep(Duration::from_millis(1)),
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(_) => return,
        }
    }
}
