//! Saving the guest: its memory and CPU state by the engine, its disk as a copy, of one and the same moment. That of a machine is
//! in [`machine::save`]; this is gVisor's:
//!
//! ```text
//!   copy the disk -> no open connections -> hold -> checkpoint -> settle the disk -> bring the copy up to date -> let go
//! ```
//!
//! The guest stands still from before the checkpoint until the disk is copied, so memory and disk belong together: the
//! checkpoint ends with the engine writing what it still held of files, and nobody writes after that. Whatever fails, a
//! guest that ran goes on. If this process dies in between, so does the guest; if only whoever asked dies, the save is
//! finished or given up between two steps: nobody would make a snapshot of it. It is given up, too, when the guest is to
//! stop.

use std::{
    fmt, fs, io,
    path::Path,
    sync::PoisonError,
    thread,
    time::{Duration, Instant},
};

use super::{
    launch::{DISK, MEMORY, Phase, Reply, Unsavable},
    machine, pause,
    state::Vm,
};
use crate::{
    gvisor,
    host::{
        flows,
        live_copy::LiveCopy,
        mount, network,
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
pub(super) enum Failed {
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

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Unsavable(what) => f.write_str(what.state()),
            Self::Full => f.write_str("the host's disk is full"),
            Self::GivenUp => f.write_str("given up"),
            Self::TimedOut { message, .. } | Self::Host(message) => f.write_str(message),
        }
    }
}

/// What took how long while the guest stood still.
pub(super) struct Took {
    pub(super) still: Duration,
    pub(super) checkpoint: Duration,
    pub(super) disk: Duration,
}

/// Saves into the folder `into`, which is there and empty, unless `given_up` while it does.
pub(super) fn save(vm: &Vm, into: &Path, given_up: impl Fn() -> bool) -> Reply {
    let _alone = vm.tools.lock().unwrap_or_else(PoisonError::into_inner);
    let was = vm.phase();
    if vm.stop_requested() || !matches!(was, Phase::Running | Phase::Paused) {
        return Reply::NotRunning;
    }
    let save = Save { vm, was, into, given_up: &given_up };
    let saved = match vm.launch.machine {
        Some(_) => machine::save::save(vm, was, into, || save.go_on()),
        None => save.run(),
    };
    match saved {
        Ok(Took { still, checkpoint, disk }) => {
            let [all, checkpoint, disk] = [still, checkpoint, disk].map(|took| took.as_secs_f64() * 1e3);
            vm.engine_log
                .line(format!("saved; it stood still for {all:.1} ms (memory {checkpoint:.1}, disk {disk:.1})"));
            Reply::Saved { paused_us: u64::try_from(still.as_micros()).unwrap_or(u64::MAX) }
        }
        Err(Failed::Unsavable(what)) => Reply::Unsavable { what },
        Err(Failed::Full) => Reply::Full,
        Err(Failed::GivenUp) => {
            vm.engine_log.line("a save was given up");
            Reply::NotRunning
        }
        Err(Failed::TimedOut { message, .. } | Failed::Host(message)) => {
            vm.errors.line(format!("saving: {message}"));
            Reply::refused("the engine could not save the VM".into())
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
    fn run(&self) -> Result<Took, Failed> {
        self.wait_quiet()?;
        // The guest may write meanwhile: what it wrote is copied again, and the less that is, the shorter it stands still.
        let disk = self.vm.scratch("disk");
        mount::settle(&disk).map_err(host("writing the disk"))?;
        let copy = LiveCopy::begin(&self.vm.folder.join(DISK), Some(&disk), &self.into.join(DISK));
        let copy = copy.map_err(host("copying the disk"))?;
        let quiet_since = self.wait_quiet()?;
        let begun = Instant::now();
        if self.was == Phase::Paused {
            let _awake = pause::Awake::of(self.vm);
            return self.save(copy, quiet_since, begun);
        }
        let held = pause::hold(self.vm).map_err(Failed::Host)?;
        let saved = self.save(copy, quiet_since, begun);
        // A checkpoint whose tool was killed may go on in the engine, which resumes nothing before it is done.
        let within = match &saved {
            Err(Failed::TimedOut { within, .. }) => *within,
            _ => pause::QUICK,
        };
        pause::let_go(self.vm, held, within);
        saved.map(|took| Took { still: begun.elapsed(), ..took })
    }

    /// Waits until the guest has no connection to anybody outside, and gives the packets that had passed before that was
    /// seen. A dial that comes later waits until the guest is saved.
    fn wait_quiet(&self) -> Result<u64, Failed> {
        let deadline = Instant::now() + QUIET;
        loop {
            self.go_on()?;
            let packets = packets()?;
            if !self.is_busy()? {
                return Ok(packets);
            }
            if Instant::now() >= deadline {
                return Err(Failed::Unsavable(Unsavable::OpenConnection));
            }
            thread::sleep(LOOK);
        }
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

    /// Saves a guest that stands still since `begun`, and had no connection when `quiet_since` packets had passed.
    fn save(&self, copy: LiveCopy, quiet_since: u64, begun: Instant) -> Result<Took, Failed> {
        let memory = self.into.join(MEMORY);
        fs::create_dir(&memory).map_err(host("making a folder"))?;
        {
            let _no_dials = self.vm.dials.write().unwrap_or_else(PoisonError::into_inner);
            // A paused guest opens nothing. What came in the moment before would not survive the attempt.
            if packets()? != quiet_since && self.is_busy()? {
                return Err(Failed::Unsavable(Unsavable::OpenConnection));
            }
            self.go_on()?;
            checkpoint(self.vm, &memory)?;
        }
        let (checkpoint, saved) = (begun.elapsed(), Instant::now());
        self.go_on()?;
        mount::settle(&self.vm.scratch("disk")).map_err(host("writing the disk"))?;
        self.go_on()?;
        copy.finish().map_err(host("copying the disk"))?;
        Ok(Took { still: begun.elapsed(), checkpoint, disk: saved.elapsed() })
    }
}

fn packets() -> Result<u64, Failed> {
    flows::packets(network::GATEWAY_LINK).map_err(host("looking at the packets"))
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

pub(super) fn host(context: &str) -> impl Fn(io::Error) -> Failed {
    move |error| match error.kind() {
        io::ErrorKind::StorageFull => Failed::Full,
        _ => Failed::Host(format!("{context}: {error}")),
    }
}
