//! Bringing a machine up: a guest with a kernel of its own, under QEMU.
//!
//! What has to stand before the guest runs stands before QEMU starts: the gateway and its filter. QEMU itself is the
//! sandbox: a child of the monitor's, jailed, and gone when its guest resets or switches itself off.

use std::{
    fs::{self, OpenOptions},
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::PathBuf,
    process::{Command, Stdio},
    sync::{Arc, PoisonError},
    thread,
    time::{Duration, Instant},
};

use nix::unistd::Pid;
use tiffin_types::vm::EndReason;

use super::{
    boot::{self, Step, step},
    jail::{self, Jail},
    launch::{DISK, MachineFiles, Phase},
    state::Vm,
};
use crate::{
    host::network::{self, GUEST_MAC},
    qemu::{self, INITRAMFS, KERNEL, Machine, OVERHEAD_MB, qmp::Qmp},
};

/// How long QEMU has for a word that needs no work.
const ANSWER: Duration = Duration::from_secs(20);
/// How often it is asked whether it is still there.
const PULSE: Duration = Duration::from_secs(10);
/// What every dynamically linked program of a Debian-like system needs.
const LIBRARIES: [&str; 5] = ["/lib", "/lib32", "/lib64", "/libx32", "/etc/ld.so.cache"];

pub(super) fn start(vm: &Arc<Vm>, files: &MachineFiles, begun: Instant) -> Step<Pid> {
    let reached = |what: &str| vm.engine_log.line(format!("{what} after {} ms", begun.elapsed().as_millis()));
    vm.group.create(vm.launch.spec.size, OVERHEAD_MB).map_err(|e| step("the control groups", e))?;
    vm.note_oom_kills();
    let (filter, tap) = thread::scope(|scope| {
        let filter = scope.spawn(|| boot::apply_filter(vm));
        let tap = network::make_tap().map_err(|e| step("the guest's network", e));
        let network = tap.and_then(|tap| boot::configure_network(vm).map(|()| tap));
        (boot::join(filter), network)
    });
    let tap = tap?;
    boot::watch_denied(vm, filter?)?;
    reached("everything prepared");
    if vm.stop_requested() {
        return Err("stopped while starting".into());
    }
    let (ours, theirs) = UnixStream::pair().map_err(|e| step("the control socket", e))?;
    let open = |path: &PathBuf, write: bool| {
        let opened = OpenOptions::new().read(true).write(write).open(path);
        opened.map(OwnedFd::from).map_err(|e| step(&path.display().to_string(), e))
    };
    let (console, from_guest) = std::io::pipe().map_err(|e| step("the console", e))?;
    let (image, disk) = (open(&vm.launch.image, false)?, open(&vm.folder.join(DISK), true)?);
    let given = vec![tap, theirs.into(), image, disk, from_guest.into()];
    let root = vm.scratch("jail");
    fs::create_dir(&root).map_err(|e| step("the jail", e))?;
    let jail =
        Jail { root: &root, shown: shown(files), devices: devices(files), user: jail::user_of(&vm.launch.spec.id) };
    let machine = Machine { size: vm.launch.spec.size, kvm: files.kvm, mac: GUEST_MAC, tsc_khz: qemu::tsc_khz() };
    let mut command = Command::new(&files.qemu);
    command.args(qemu::arguments(&machine)).env_clear();
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let door = vm.group.door().map_err(|e| step("the control groups", e))?;
    let mut child = jail.spawn(command, door, given).map_err(|e| step("starting QEMU", e))?;
    let (of, own_words) = (Arc::clone(vm), child.stderr.take());
    vm.add_listener("console", move || of.console.copy_from(console)).map_err(|e| step("a thread", e))?;
    if let Some(own_words) = own_words {
        let of = Arc::clone(vm);
        vm.add_listener("qemu", move || of.errors.copy_from(own_words)).map_err(|e| step("a thread", e))?;
    }
    boot::listen_to(vm, &mut child)?;
    let cable = boot::boot_agent(vm, &mut child)?;
    reached("the machine started");
    let of = Arc::clone(vm);
    let thread = thread::Builder::new().name("pulse".into()).stack_size(128 * 1024);
    let keep = move || {
        let _cable = cable;
        watch(&of, ours);
    };
    thread.spawn(keep).map_err(|e| step("a thread", e))?;
    i32::try_from(child.id()).map(Pid::from_raw).map_err(|e| step("QEMU's pid", e))
}

fn shown(files: &MachineFiles) -> Vec<(PathBuf, PathBuf)> {
    let mut shown = vec![(files.kernel.clone(), KERNEL.into()), (files.initramfs.clone(), INITRAMFS.into())];
    let own = qemu::prefix(&files.qemu).map(PathBuf::from).unwrap_or_else(|| files.qemu.clone());
    let mut folders = vec![PathBuf::from("/usr")];
    if !own.starts_with("/usr") {
        folders.push(own);
    }
    folders.extend(LIBRARIES.map(PathBuf::from));
    shown.extend(folders.into_iter().map(|folder| (folder.clone(), folder)));
    shown
}

fn devices(files: &MachineFiles) -> Vec<PathBuf> {
    let mut devices = vec!["/dev/null", "/dev/urandom"];
    if files.kvm {
        devices.push("/dev/kvm");
    }
    devices.into_iter().map(PathBuf::from).collect()
}

/// Keeps the control socket, and ends a machine whose QEMU says nothing any more: what hangs there can't be told from a
/// guest that has taken it over.
fn watch(vm: &Vm, socket: UnixStream) {
    let lost = |what: std::io::Error| {
        if vm.phase() != Phase::Ended && !vm.stop_requested() {
            vm.errors.line(format!("the machine's control socket: {what}"));
            vm.decide_end(EndReason::EngineLost, "the machine's emulator did not answer");
        }
    };
    match Qmp::greet(socket, ANSWER) {
        Ok(qmp) => *vm.qmp.lock().unwrap_or_else(PoisonError::into_inner) = Some(qmp),
        Err(error) => return lost(error),
    }
    while !vm.wait_for_end(Instant::now() + PULSE) {
        if let Err(error) = ask(vm, "query-status") {
            return lost(error);
        }
    }
}

/// Has QEMU do something that takes no time.
pub(super) fn ask(vm: &Vm, command: &str) -> std::io::Result<()> {
    let mut qmp = vm.qmp.lock().unwrap_or_else(PoisonError::into_inner);
    let qmp = qmp.as_mut().ok_or(std::io::ErrorKind::NotConnected)?;
    qmp.ask(command, ANSWER).map(drop)
}
