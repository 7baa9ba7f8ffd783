//! Saving a machine: its memory, the state of its processor and devices, and its disk, of one and the same moment.
//!
//! ```text
//!   begin to copy memory and disk (the guest goes on) -> stop -> state, rest of memory, rest of disk -> cont
//! ```
//!
//! QEMU writes the state alone (`xen-save-devices-state`; nothing in it is Xen's), some kilobytes; memory and disk are files that
//! the monitor copies. What the guest had not yet written to its disk is in its memory: the two belong together, and nothing of
//! the guest has to be settled for it. Its connections are saved with it, and are dead where it goes on.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Seek},
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    time::Instant,
};

use nix::{
    sys::memfd::{MFdFlags, memfd_create},
    unistd::Pid,
};
use serde_json::json;

use super::{Running, ask};
use crate::{
    host::live_copy::LiveCopy,
    monitor::{
        egress,
        launch::{DISK, MEMORY, Phase, RAM, STATE},
        pause,
        save::{Failed, Took, host},
        state::Vm,
    },
    qemu,
};

/// Bytes of a state; one with as few devices as ours has some ten thousand.
const MAX_STATE: u64 = 64 << 20;

/// What QEMU writes a state with: a file without a name, of which it has the end for writing.
pub(in crate::monitor) struct Pen {
    file: File,
    /// One description for both: where this is put, QEMU goes on writing.
    end: File,
}

impl Pen {
    pub(super) fn new() -> io::Result<Self> {
        let file = File::from(memfd_create(c"state", MFdFlags::MFD_CLOEXEC)?);
        // QEMU takes a descriptor for writing that can do nothing else.
        let end = OpenOptions::new().write(true).open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        Ok(Self { file, end })
    }

    /// What QEMU is given.
    pub(super) fn lent(&self) -> io::Result<OwnedFd> {
        Ok(self.end.try_clone()?.into())
    }

    fn clear(&self) -> io::Result<()> {
        self.file.set_len(0)?;
        (&self.end).rewind()
    }

    fn copy_to(&self, to: &Path) -> io::Result<()> {
        if self.file.metadata()?.len() > MAX_STATE {
            return Err(io::Error::other("the state is too large"));
        }
        (&self.file).rewind()?;
        let mut to = OpenOptions::new().write(true).create_new(true).open(to)?;
        io::copy(&mut &self.file, &mut to).map(drop)
    }
}

/// Saves a guest that is running or, as `was` says, paused into the folder `into`. `go_on` fails once it is no longer wanted.
pub(in crate::monitor) fn save(
    vm: &Vm,
    was: Phase,
    into: &Path,
    go_on: impl Fn() -> Result<(), Failed>,
) -> Result<Took, Failed> {
    let (Some(running), Some(qemu)) = (vm.machine.get(), vm.sandbox.get()) else {
        return Err(Failed::Host("there is no machine".into()));
    };
    let copies = Copies::begin(vm, running, into)?;
    go_on()?;
    let begun = Instant::now();
    if was == Phase::Paused {
        return copies.finish(vm, *qemu, begun);
    }
    ask(vm, "stop", &json!({})).map_err(host("stopping the machine"))?;
    let saved = go_on().and_then(|()| copies.finish(vm, *qemu, begun));
    let gone_on = ask(vm, "cont", &json!({}));
    if let Err(error) = gone_on {
        pause::end(vm, &error.to_string());
    }
    let still = begun.elapsed();
    // Its clock stood still with it.
    egress::tell(vm);
    saved.map(|took| Took { still, ..took })
}

/// Saves a guest that has just booted. It is no VM yet, so nothing else is asked of it meanwhile.
pub(super) fn save_template(vm: &Vm, qemu: Pid, into: &Path) -> Result<(), String> {
    let told = |failed: Failed| failed.to_string();
    let running = vm.machine.get().ok_or("there is no machine")?;
    let copies = Copies::begin(vm, running, into).map_err(told)?;
    ask(vm, "stop", &json!({})).map_err(|e| e.to_string())?;
    let begun = Instant::now();
    let saved = copies.finish(vm, qemu, begun);
    if let Err(error) = ask(vm, "cont", &json!({})) {
        pause::end(vm, &error.to_string());
    }
    let took = saved.map_err(told)?;
    vm.engine_log.line(format!("left a template; it stood still for {:.1} ms", took.still.as_secs_f64() * 1e3));
    Ok(())
}

/// Copies that are begun while the guest still runs.
struct Copies<'a> {
    pen: &'a Pen,
    state: PathBuf,
    memory: super::memory::Copy<'a>,
    disk: LiveCopy,
}

impl<'a> Copies<'a> {
    fn begin(vm: &Vm, running: &'a Running, into: &Path) -> Result<Self, Failed> {
        let folder = into.join(MEMORY);
        fs::create_dir(&folder).map_err(host("making a folder"))?;
        let memory = running.memory.begin_copy(&folder.join(RAM)).map_err(host("copying the memory"))?;
        let disk = LiveCopy::begin(&vm.folder.join(DISK), None, &into.join(DISK)).map_err(host("copying the disk"))?;
        Ok(Self { pen: &running.pen, state: folder.join(STATE), memory, disk })
    }

    /// Makes them whole. The machine stands still.
    fn finish(self, vm: &Vm, qemu: Pid, begun: Instant) -> Result<Took, Failed> {
        self.pen.clear().map_err(host("clearing the last state"))?;
        let to = json!({ "filename": format!("/dev/fdset/{}", qemu::STATE), "live": false });
        ask(vm, "xen-save-devices-state", &to).map_err(host("saving the state"))?;
        self.pen.copy_to(&self.state).map_err(host("copying the state"))?;
        self.memory.finish(qemu).map_err(host("copying the memory"))?;
        let (checkpoint, saved) = (begun.elapsed(), Instant::now());
        self.disk.finish().map_err(host("copying the disk"))?;
        Ok(Took { still: begun.elapsed(), checkpoint, disk: saved.elapsed() })
    }
}
