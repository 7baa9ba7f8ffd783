//! Saving the guest: its memory and CPU state by the engine, its disk as a copy, of one and the same moment.
//!
//! ```text
//!   no open connections -> pause -> checkpoint -> settle the disk -> copy it -> resume
//! ```
//!
//! The guest stands still from before the checkpoint until the disk is copied, so memory and disk belong together: the
//! checkpoint ends with the engine writing what it still held of files, and nobody writes after that. Whatever fails, a
//! guest that ran goes on. If this process dies in between, so does the guest; if only whoever asked dies, the save is
//! finished all the same.

use std::{
    fs, io,
    path::Path,
    sync::PoisonError,
    thread,
    time::{Duration, Instant},
};

use super::{
    control::run,
    launch::{DISK, MEMORY, Phase, Reply, Unsavable},
    state::Vm,
};
use crate::{
    gvisor,
    host::{disk, flows, mount, network, process},
};

/// How long connections that are about to end have for it.
const QUIET: Duration = Duration::from_secs(3);
/// Between two looks at the connections.
const LOOK: Duration = Duration::from_millis(10);
/// What a checkpoint writes at least, in MiB a second, on the slowest disk that one waits for.
const SLOWEST: u64 = 20;

/// Why a save failed.
enum Failed {
    Unsavable(Unsavable),
    Full,
    Host(String),
}

/// Saves into the folder `into`, which is there and empty.
pub(super) fn save(vm: &Vm, into: &Path) -> Reply {
    let _alone = vm.tools.lock().unwrap_or_else(PoisonError::into_inner);
    let was = vm.phase();
    if !matches!(was, Phase::Running | Phase::Paused) {
        return Reply::NotRunning;
    }
    match save_in(vm, was, into) {
        Ok(paused) => {
            vm.engine_log.line(format!("saved; it stood still for {} ms", paused.as_millis()));
            Reply::Saved { paused_us: u64::try_from(paused.as_micros()).unwrap_or(u64::MAX) }
        }
        Err(Failed::Unsavable(what)) => Reply::Unsavable { what },
        Err(Failed::Full) => Reply::Full,
        Err(Failed::Host(message)) => {
            vm.errors.line(format!("saving: {message}"));
            Reply::Refused { message: "the engine could not save the VM".into() }
        }
    }
}

fn save_in(vm: &Vm, was: Phase, into: &Path) -> Result<Duration, Failed> {
    wait_quiet(vm)?;
    let begun = Instant::now();
    if was == Phase::Running {
        run(vm, gvisor::pause).map_err(|e| Failed::Host(e.to_string()))?;
    }
    let copied = copy(vm, into);
    if was == Phase::Running
        && let Err(error) = run(vm, gvisor::resume).or_else(|_| run(vm, gvisor::resume))
    {
        // It stands still, and must not seem to run.
        vm.errors.line(format!("going on after a save: {error}"));
        vm.set_phase(Phase::Paused);
    }
    copied.map(|()| begun.elapsed())
}

/// Waits until the guest has no connection to anybody outside; a dial that comes later waits until the guest is saved.
fn wait_quiet(vm: &Vm) -> Result<(), Failed> {
    let deadline = Instant::now() + QUIET;
    while is_busy(vm)? {
        if Instant::now() >= deadline {
            return Err(Failed::Unsavable(Unsavable::OpenConnection));
        }
        thread::sleep(LOOK);
    }
    Ok(())
}

fn is_busy(vm: &Vm) -> Result<bool, Failed> {
    let guest_v6 = network::GUEST_V6.parse().map_err(|_| Failed::Host("no address".into()))?;
    let busy = flows::has_open(network::GUEST_V4, guest_v6).map_err(host("looking at the connections"))?;
    Ok(busy && vm.phase() != Phase::Ended)
}

fn copy(vm: &Vm, into: &Path) -> Result<(), Failed> {
    let memory = into.join(MEMORY);
    fs::create_dir(&memory).map_err(host("making a folder"))?;
    {
        let _no_dials = vm.dials.write().unwrap_or_else(PoisonError::into_inner);
        // A paused guest opens nothing. What came in the moment before would not survive the attempt.
        if is_busy(vm)? {
            return Err(Failed::Unsavable(Unsavable::OpenConnection));
        }
        checkpoint(vm, &memory)?;
    }
    mount::settle(&vm.scratch("disk")).map_err(host("writing the disk"))?;
    disk::copy_sparse(&vm.folder.join(DISK), &into.join(DISK)).map_err(host("copying the disk"))
}

fn checkpoint(vm: &Vm, memory: &Path) -> Result<(), Failed> {
    let within = Duration::from_secs(30 + u64::from(vm.launch.spec.size.mem_mb) / SLOWEST);
    let command = vm.with_paths(|paths| gvisor::checkpoint(paths, memory));
    process::run_within(command, "", within).map(drop).map_err(|error| {
        let said = error.to_string();
        match gvisor::unsavable(&said) {
            Some(what) => Failed::Unsavable(what),
            None if said.contains("no space left on device") => Failed::Full,
            None => Failed::Host(said),
        }
    })
}

fn host(context: &str) -> impl Fn(io::Error) -> Failed {
    move |error| match error.kind() {
        io::ErrorKind::StorageFull => Failed::Full,
        _ => Failed::Host(format!("{context}: {error}")),
    }
}
