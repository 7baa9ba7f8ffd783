//! Bringing a machine up: a guest with a kernel of its own, under QEMU.
//!
//! What has to stand before the guest runs stands before QEMU starts: the gateway and its filter. QEMU itself is the
//! sandbox: a child of the monitor's, jailed, and gone when its guest resets or switches itself off.

pub(super) mod lend;
mod memory;
pub(super) mod save;

use std::{
    fs::{self, OpenOptions},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, PoisonError},
    thread,
    time::{Duration, Instant},
};

use nix::unistd::Pid;
use serde_json::{Value, json};
use tiffin_types::vm::EndReason;

use self::{memory::Memory, save::Pen};
use super::{
    boot::{self, Step, step},
    end::forget_memory,
    jail::{self, Jail},
    launch::{DISK, MEMORY, MachineFiles, Phase, RAM, STATE, Template},
    state::Vm,
};
use crate::{
    host::network::{self, GUEST_MAC},
    qemu::{self, INITRAMFS, KERNEL, Machine, OVERHEAD_MB, clock::Look, qmp::Qmp},
};

/// How long QEMU has for a word that needs no work.
const ANSWER: Duration = Duration::from_secs(20);
/// How long it has to be gone, once it doesn't answer.
const LAST_STEPS: Duration = Duration::from_secs(5);
/// How often it is asked whether it is still there.
const PULSE: Duration = Duration::from_secs(10);
/// What every dynamically linked program of a Debian-like system needs.
const LIBRARIES: [&str; 5] = ["/lib", "/lib32", "/lib64", "/libx32", "/etc/ld.so.cache"];

/// Between two looks whether QEMU has greeted.
const GREETING: Duration = Duration::from_millis(2);

/// What a machine that runs is made of, as far as it is needed again.
pub(super) struct Running {
    memory: Memory,
    pen: Pen,
}

pub(super) fn start(vm: &Arc<Vm>, files: &MachineFiles, begun: Instant, deadline: Instant) -> Step<Pid> {
    let reached = |what: &str| vm.engine_log.line(format!("{what} after {} ms", begun.elapsed().as_millis()));
    let saved = vm.launch.restore.as_ref();
    let counter = if saved.is_some() { None } else { Look::now() };
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
    let size = vm.launch.spec.size;
    let folder = vm.folder.join(MEMORY);
    let memory = match saved {
        Some(_) => Memory::saved(&folder.join(RAM), size.mem_mb),
        None => Memory::new(size.mem_mb),
    };
    let memory = memory.map_err(|e| step("the guest's memory", e))?;
    let pen = Pen::new().map_err(|e| step("a memory for the state", e))?;
    reached("everything prepared");
    if vm.stop_requested() {
        return Err("stopped while starting".into());
    }
    // From here on the guest may get to write to its disk, which then no longer is that of its saved memory.
    boot::forget_restore(vm).map_err(|e| step("forgetting the saved memory", e))?;
    let (ours, theirs) = UnixStream::pair().map_err(|e| step("the control socket", e))?;
    let (console, from_guest) = io::pipe().map_err(|e| step("the console", e))?;
    let mut given = vec![tap, theirs.into(), open(&vm.launch.image, false)?, open(&vm.folder.join(DISK), true)?];
    given.extend([from_guest.into(), pen.lent().map_err(|e| step("a memory for the state", e))?]);
    if saved.is_some() {
        given.push(open(&folder.join(STATE), false)?);
    }
    // One that goes on has known it since it booted.
    let tsc_khz = counter.and_then(Look::khz);
    let machine = Machine { size, kvm: files.kvm, mac: GUEST_MAC, tsc_khz, saved: saved.is_some() };
    let mut child = spawn(vm, files, &machine, given, &memory)?;
    let pid = i32::try_from(child.id()).map(Pid::from_raw).map_err(|e| step("QEMU's pid", e))?;
    let _ = vm.machine.set(Running { memory, pen });
    let (of, own_words) = (Arc::clone(vm), child.stderr.take());
    vm.add_listener("console", move || of.console.copy_from(of.words.overhear(console)))
        .map_err(|e| step("a thread", e))?;
    if let Some(own_words) = own_words {
        let of = Arc::clone(vm);
        vm.add_listener("qemu", move || of.errors.copy_from(own_words)).map_err(|e| step("a thread", e))?;
    }
    boot::listen_to(vm, &mut child)?;
    // The guest takes the end of this for a cable that was pulled.
    let cable = match saved {
        Some(saved) => {
            boot::rename_guest(vm, saved.token.clone(), deadline)?;
            forget_memory(&vm.folder).map_err(|e| step("removing the saved memory", e))?;
            child.stdin.take()
        }
        None => boot::boot_agent(vm, &mut child)?,
    };
    reached("the machine started");
    let of = Arc::clone(vm);
    let thread = thread::Builder::new().name("pulse".into()).stack_size(128 * 1024);
    let keep = move || {
        let _cable = cable;
        watch(&of, ours);
    };
    thread.spawn(keep).map_err(|e| step("a thread", e))?;
    if let (Some(template), None) = (&vm.launch.template, saved) {
        leave_template(vm, template.clone(), pid, deadline)?;
    }
    Ok(pid)
}

/// Starts QEMU in its jail, with what it is given, and lends it the guest's memory.
fn spawn(vm: &Arc<Vm>, files: &MachineFiles, machine: &Machine, given: Vec<OwnedFd>, memory: &Memory) -> Step<Child> {
    let root = vm.scratch("jail");
    fs::create_dir(&root).map_err(|e| step("the jail", e))?;
    let (desk, counter) = UnixStream::pair().map_err(|e| step("the jail", e))?;
    let jail = Jail {
        root: &root,
        shown: shown(files, machine.saved),
        devices: devices(files),
        user: jail::user_of(&vm.launch.spec.id),
        desk: counter.into(),
    };
    let mut command = Command::new(&files.qemu);
    command.args(qemu::arguments(machine)).env_clear();
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let door = vm.group.door().map_err(|e| step("the control groups", e))?;
    let child = jail.spawn(command, door, given).map_err(|e| step("starting QEMU", e))?;
    drop(jail);
    let listener = lend::take(desk.as_raw_fd()).map_err(|e| step("lending the guest's memory", e))?;
    let lent = memory.file().try_clone().map_err(|e| step("lending the guest's memory", e))?;
    let of = Arc::clone(vm);
    let thread = thread::Builder::new().name("lend".into()).stack_size(64 * 1024);
    let lend = move || lend::lend(&listener, qemu::MEMORY, &lent, || of.phase() == Phase::Starting);
    thread.spawn(lend).map_err(|e| step("a thread", e))?;
    Ok(child)
}

fn open(path: &Path, write: bool) -> Step<OwnedFd> {
    let opened = OpenOptions::new().read(true).write(write).open(path);
    opened.map(OwnedFd::from).map_err(|e| step(&path.display().to_string(), e))
}

/// Saves a guest that has just booted and is nobody yet, where others are to go on from, and makes it this VM then. Should the first
/// fail, the guest is none the worse for it.
fn leave_template(vm: &Arc<Vm>, template: Template, qemu: Pid, deadline: Instant) -> Step<()> {
    let vm = Arc::clone(vm);
    let leave = move || {
        if !vm.wait_booted(deadline) {
            return;
        }
        if let Err(error) = save::save_template(&vm, qemu, &template.into) {
            vm.errors.line(format!("leaving a template: {error}"));
            // What is left of it is no template, as it has no seal.
            let _ = fs::remove_dir_all(&template.into);
        }
        boot::become_this(&vm, &template.token, deadline);
    };
    let thread = thread::Builder::new().name("template".into()).stack_size(256 * 1024);
    thread.spawn(leave).map(drop).map_err(|e| step("a thread", e))
}

fn shown(files: &MachineFiles, saved: bool) -> Vec<(PathBuf, PathBuf)> {
    let first = [(files.kernel.clone(), KERNEL.into()), (files.initramfs.clone(), INITRAMFS.into())];
    let mut shown = if saved { Vec::new() } else { Vec::from(first) };
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
        // When QEMU has ended, its exit says more than the socket's.
        if !vm.wait_for_end(Instant::now() + LAST_STEPS) && vm.phase() != Phase::Ended && !vm.stop_requested() {
            vm.errors.line(format!("the machine's control socket: {what}"));
            vm.decide_end(EndReason::EngineLost, "the machine's emulator did not answer");
        }
    };
    match Qmp::greet(socket, ANSWER) {
        Ok(qmp) => *vm.qmp.lock().unwrap_or_else(PoisonError::into_inner) = Some(qmp),
        Err(error) => return lost(error),
    }
    while !vm.wait_for_end(Instant::now() + PULSE) {
        if let Err(error) = ask(vm, "query-status", &json!({})) {
            return lost(error);
        }
    }
}

/// Has QEMU do something that takes little time. One that was started a moment ago is waited for.
pub(super) fn ask(vm: &Vm, command: &str, arguments: &Value) -> io::Result<()> {
    let deadline = Instant::now() + ANSWER;
    loop {
        if let Some(qmp) = vm.qmp.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            return qmp.ask(command, arguments, ANSWER).map(drop);
        }
        if Instant::now() >= deadline || vm.phase() == Phase::Ended {
            return Err(io::ErrorKind::NotConnected.into());
        }
        thread::sleep(GREETING);
    }
}
