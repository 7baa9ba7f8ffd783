//! Saving the guest: its memory and CPU state by the engine, its disk as a copy, of one and the same moment.
//!
//! ```text
//!   no open connections -> pause -> checkpoint -> settle the disk -> copy it -> resume
//! ```
//!
//! The guest stands still from before the checkpoint until the disk is copied, so memory and disk belong together: the
//! checkpoint ends with the engine writing what it still held of files, and nobody writes after that. Whatever fails, a
//! guest that ran goes on. If this process dies in between, so does the guest; if only whoever asked dies, the save is
//! finished or given up between two steps: nobody would make a snapshot of it. It is given up, too, when the guest is to
//! stop.

use std::{
    fs, io,
    path::Path,
    sync::PoisonError,
    thread,
    time::{Duration, Instant},
};

use super::{
    launch::{DISK, MEMORY, Phase, Reply, Unsavable},
    pause,
    state::Vm,
};
use crate::{
    gvisor,
    host::{
        disk, flows, mount, network,
        process::{self, ToolError},
    },
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
    /// It is no longer wanted.
    GivenUp,
    /// The tool was killed at its time limit: what it has done, and still does, is unknown.
    TimedOut {
        within: Duration,
        message: String,
    },
    Host(String),
}

/// Saves into the folder `into`, which is there and empty, unless `given_up` while it does.
pub(super) fn save(vm: &Vm, into: &Path, given_up: impl Fn() -> bool) -> Reply {
    let _alone = vm.tools.lock().unwrap_or_else(PoisonError::into_inner);
    let was = vm.phase();
    if vm.stop_requested() || !matches!(was, Phase::Running | Phase::Paused) {
        return Reply::NotRunning;
    }
    let save = Save { vm, was, into, given_up: &given_up };
    match save.run() {
        Ok(paused) => {
            vm.engine_log.line(format!("saved; it stood still for {} ms", paused.as_millis()));
            Reply::Saved { paused_us: u64::try_from(paused.as_micros()).unwrap_or(u64::MAX) }
        }
        Err(Failed::Unsavable(what)) => Reply::Unsavable { what },
        Err(Failed::Full) => Reply::Full,
        Err(Failed::GivenUp) => {
            vm.engine_log.line("a save was given up");
            Reply::NotRunning
        }
        Err(Failed::TimedOut { message, .. } | Failed::Host(message)) => {
            vm.errors.line(format!("saving: {message}"));
            Reply::Refused { message: "the engine could not save the VM".into() }
        }
    }
}

struct Save<'a> {
    vm: &'a Vm,
    /// The phase that it begins and ends with.
    was: Phase,
    into: &'a Path,
    given_up: &'a dyn Fn() -> bool,
}

impl Save<'_> {
    /// For how long the guest stood still.
    fn run(&self) -> Result<Duration, Failed> {
        self.wait_quiet()?;
        let begun = Instant::now();
        if self.was == Phase::Running {
            pause::pause(self.vm).map_err(|e| Failed::Host(e.to_string()))?;
        }
        let copied = self.copy();
        if self.was == Phase::Running {
            // A checkpoint whose tool was killed may go on in the engine, which resumes nothing before it is done.
            let within = match &copied {
                Err(Failed::TimedOut { within, .. }) => *within,
                _ => pause::QUICK,
            };
            pause::go_on_or_end(self.vm, within);
        }
        copied.map(|()| begun.elapsed())
    }

    /// Waits until the guest has no connection to anybody outside; a dial that comes later waits until the guest is saved.
    fn wait_quiet(&self) -> Result<(), Failed> {
        let deadline = Instant::now() + QUIET;
        self.go_on()?;
        while self.is_busy()? {
            if Instant::now() >= deadline {
                return Err(Failed::Unsavable(Unsavable::OpenConnection));
            }
            thread::sleep(LOOK);
            self.go_on()?;
        }
        Ok(())
    }

    /// Whether the next step is still wanted.
    fn go_on(&self) -> Result<(), Failed> {
        if self.vm.stop_requested() || (self.given_up)() { Err(Failed::GivenUp) } else { Ok(()) }
    }

    fn is_busy(&self) -> Result<bool, Failed> {
        let guest_v6 = network::GUEST_V6.parse().map_err(|_| Failed::Host("no address".into()))?;
        let busy = flows::has_open(network::GUEST_V4, guest_v6).map_err(host("looking at the connections"))?;
        Ok(busy && self.vm.phase() != Phase::Ended)
    }

    fn copy(&self) -> Result<(), Failed> {
        let memory = self.into.join(MEMORY);
        fs::create_dir(&memory).map_err(host("making a folder"))?;
        {
            let _no_dials = self.vm.dials.write().unwrap_or_else(PoisonError::into_inner);
            // A paused guest opens nothing. What came in the moment before would not survive the attempt.
            if self.is_busy()? {
                return Err(Failed::Unsavable(Unsavable::OpenConnection));
            }
            self.go_on()?;
            checkpoint(self.vm, &memory)?;
        }
        self.go_on()?;
        mount::settle(&self.vm.scratch("disk")).map_err(host("writing the disk"))?;
        self.go_on()?;
        disk::copy_sparse(&self.vm.folder.join(DISK), &self.into.join(DISK)).map_err(host("copying the disk"))
    }
}

fn checkpoint(vm: &Vm, memory: &Path) -> Result<(), Failed> {
    let within = Duration::from_secs(30 + u64::from(vm.launch.spec.size.mem_mb) / SLOWEST);
    let command = vm.with_paths(|paths| gvisor::checkpoint(paths, memory));
    process::run_within(command, "", within).map(drop).map_err(|error| {
        let said = error.to_string();
        if let ToolError::TimedOut { .. } = error {
            return Failed::TimedOut { within, message: said };
        }
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
