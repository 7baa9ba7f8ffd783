//! Bringing a guest up: everything it stands on, in parallel where nothing forbids it, then the engine.
//!
//! The order that matters: the network namespaces are proved to be not the host's before gVisor's own check of that is
//! put out of the way; the packet filter stands before the guest runs; the engine joins its control groups before its
//! first instruction.

use std::{
    fs::{self, File},
    io::{self, Write},
    net::SocketAddr,
    os::unix::process::CommandExt,
    path::Path,
    process::{Child, ChildStdin, Command, Stdio},
    sync::Arc,
    thread::{self, ScopedJoinHandle},
    time::{Duration, Instant},
};

use nix::{
    fcntl::{FcntlArg, fcntl},
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    unistd::Pid,
};
use tiffin_types::vm::{EndReason, EndReport};

use super::{
    agent, channel,
    end::forget_memory,
    gate::Gate,
    launch::{self, DISK, LAUNCHER_LOG, MEMORY, Phase, RESTORE, SCRATCH},
    machine, rest,
    state::Vm,
};
use crate::{
    gvisor,
    host::{
        cgroup::ENGINE_MEM_MB,
        denied::Listener,
        dns, filter, flows,
        mount::{mount_disk, mount_overlay},
        network::{self, Uplink},
        process::wait_until,
    },
};

/// Where the agent stands in every guest.
const AGENT: &str = "/.tiffin/tiffin-agent";

/// Room in the pipe that a program's output comes through.
const CHANNEL_PIPE: libc::c_int = 256 * 1024;

/// A step of the boot failed; the text is for the engine's log, not for the API.
pub(super) type Step<T> = Result<T, String>;

/// Starts the guest and gives the sandbox's pid; whether the agent gets ready in time is watched from then on.
pub(super) fn boot(vm: &Arc<Vm>) -> Result<Pid, EndReport> {
    let begun = Instant::now();
    let deadline = begun + Duration::from_millis(vm.launch.boot_timeout_ms);
    let failed = |message: String| {
        vm.errors.line(&message);
        vm.verdict().unwrap_or_else(|| report(vm, EndReason::BootFailed, "the engine could not start the VM"))
    };
    let sandbox = start(vm, begun, deadline).map_err(failed)?;
    let _ = vm.sandbox.set(sandbox);
    let watched = Arc::clone(vm);
    let watch = move || match watched.wait_while(Phase::Starting, Some(deadline)) {
        Some(Phase::Running | Phase::Paused) => {
            watched.engine_log.line(format!("up after {} ms", begun.elapsed().as_millis()));
            if watched.launch.machine.is_none() {
                rest::keep(&watched);
            }
        }
        Some(Phase::Starting | Phase::Ended) => {}
        None => {
            let late = format!("the guest's agent was not ready within {} ms", watched.launch.boot_timeout_ms);
            let is_machine = watched.launch.machine.is_some();
            watched.decide_end(EndReason::BootTimeout, if is_machine { watched.words.explain(&late) } else { late });
        }
    };
    let thread = thread::Builder::new().name("boot".into()).stack_size(64 * 1024);
    thread.spawn(watch).map_err(|e| failed(step("a thread", e)))?;
    Ok(sandbox)
}

/// The report for an end during boot: a stop that was asked for is no failure.
fn report(vm: &Vm, reason: EndReason, message: &str) -> EndReport {
    if vm.stop_requested() {
        return EndReport { reason: EndReason::Requested, message: "stopped while starting".into(), exit_code: None };
    }
    EndReport { reason, message: message.into(), exit_code: None }
}

fn start(vm: &Arc<Vm>, begun: Instant, deadline: Instant) -> Step<Pid> {
    leave_the_host(vm)?;
    match &vm.launch.machine {
        Some(machine) => machine::start(vm, machine, begun, deadline),
        None => start_sandbox(vm, begun, deadline),
    }
}

fn start_sandbox(vm: &Arc<Vm>, begun: Instant, deadline: Instant) -> Step<Pid> {
    let reached = |what: &str| vm.engine_log.line(format!("{what} after {} ms", begun.elapsed().as_millis()));
    for name in ["runsc", "bundle"] {
        fs::create_dir(vm.scratch(name)).map_err(|e| step("the scratch folder", e))?;
    }
    let restore = vm.launch.restore.as_ref();
    let gate = Gate::new(&vm.scratch(LAUNCHER_LOG)).map_err(|e| step("the gate", e))?;
    let pid_file = vm.scratch("sandbox.pid");
    let mut child = thread::scope(|scope| -> Step<Child> {
        let engine = scope.spawn(|| spawn_engine(vm, &pid_file));
        // From here on the guest may get to write to its disk, which then no longer is that of its saved memory.
        let forgotten = scope.spawn(|| forget_restore(vm).map_err(|e| step("forgetting the saved memory", e)));
        let prepared = prepare(vm, scope);
        let (forgotten, engine) = (join(forgotten), join(engine));
        reached("everything prepared");
        let mut engine = engine?;
        let opened = prepared
            .and_then(|()| if vm.stop_requested() { Err("stopped while starting".into()) } else { Ok(()) })
            .and(forgotten)
            .and_then(|()| gate.open().map_err(|e| step("opening the gate", e)));
        if opened.is_err() {
            // It waits at the gate, alone: everything else is made behind it.
            let _ = engine.kill().and_then(|()| engine.wait());
        }
        opened.map(|()| engine)
    })?;
    listen_to(vm, &mut child)?;
    if restore.is_none() {
        drop(boot_agent(vm, &mut child)?);
    }
    wait_for_launcher(vm, &mut child, deadline)?;
    reached("engine launched");
    if let Some(saved) = restore {
        rename_guest(vm, saved.token.clone(), deadline)?;
        forget_memory(&vm.folder).map_err(|e| step("removing the saved memory", e))?;
    }
    if vm.stop_requested() {
        // Whoever asked may have killed everything a moment before there was anything to kill.
        vm.kill_all();
    }
    let pid = fs::read_to_string(&pid_file).map_err(|e| step("reading the sandbox's pid", e))?;
    pid.trim().parse().map(Pid::from_raw).map_err(|_| format!("no pid: {pid}"))
}

/// Not even a power cut may bring the saved memory back once the guest has written to the disk.
pub(super) fn forget_restore(vm: &Vm) -> io::Result<()> {
    if vm.launch.restore.is_none() {
        return Ok(());
    }
    launch::remove(&vm.folder, RESTORE)?;
    File::open(&vm.folder)?.sync_all()
}

pub(super) fn step(what: &str, error: impl std::fmt::Display) -> String {
    format!("{what}: {error}")
}

pub(super) fn join<T>(thread: ScopedJoinHandle<'_, Step<T>>) -> Step<T> {
    thread.join().unwrap_or_else(|_| Err("a thread of the boot panicked".into()))
}

/// Makes the mount namespace the VM's own and proves that the network is another one: nothing that is mounted from here on shows on the host.
fn leave_the_host(vm: &Vm) -> Step<()> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none).map_err(|e| step("a mount namespace", e))?;
    forget_other_images(&vm.launch.image);
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none).map_err(|e| step("mounting /proc", e))?;
    prove_apart(vm)?;
    network::configure_gateway_kernel().map_err(|e| step("configuring the gateway", e))?;
    let scratch = vm.folder.join(SCRATCH);
    fs::create_dir_all(&scratch).map_err(|e| step("the scratch folder", e))?;
    mount(Some("tiffin"), &scratch, Some("tmpfs"), MsFlags::empty(), Some("mode=700,size=16m"))
        .map_err(|e| step("mounting the scratch folder", e))
}

/// The namespace began as a copy of the host's: without this, the VM would keep other images' disk space as long as it runs. What
/// can't be unmounted is no reason not to boot.
fn forget_other_images(own: &Path) {
    for image in own.parent().and_then(|images| fs::read_dir(images).ok()).into_iter().flatten().flatten() {
        if image.path() != own {
            let _ = umount2(&image.path(), MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        }
    }
}

/// gVisor takes the addresses off the interfaces that it finds: the namespace must not be the host's.
fn prove_apart(vm: &Vm) -> Step<()> {
    let here = network::namespace_id().map_err(|e| step("looking at the network namespace", e))?;
    if here == vm.host_namespace_id { Err("this is the host's network namespace".into()) } else { Ok(()) }
}

/// Everything that has to stand before the engine may run.
fn prepare<'scope>(vm: &'scope Arc<Vm>, scope: &'scope thread::Scope<'scope, '_>) -> Step<()> {
    let filter = scope.spawn(|| apply_filter(vm));
    let disk = scope.spawn(|| mount_root(vm));
    let guest = scope.spawn(|| make_guest_namespace(vm));
    let network = join(guest).and_then(|()| configure_network(vm));
    let (filter, disk) = (join(filter), join(disk));
    network?;
    disk?;
    watch_denied(vm, filter?)?;
    hide_the_host(vm)?;
    let config = gvisor::bundle_config(&vm.scratch("root"), AGENT, &vm.scratch("netns"), vm.launch.spec.id.as_str());
    fs::write(vm.scratch("bundle/config.json"), config.to_string()).map_err(|e| step("the bundle", e))
}

/// What stands between the guest and everything else.
pub(super) fn apply_filter(vm: &Vm) -> Step<Listener> {
    let listener = Listener::open().map_err(|e| step("listening for denied packets", e))?;
    filter::apply_gateway(&vm.launch.spec.egress, &vm.host_addresses).map_err(|e| step("the packet filter", e))?;
    flows::configure();
    Ok(listener)
}

fn mount_root(vm: &Vm) -> Step<()> {
    let (disk, root) = (vm.scratch("disk"), vm.scratch("root"));
    mount_disk(&vm.folder.join(DISK), &disk).map_err(|e| step("mounting the disk", e))?;
    mount_overlay(&[&vm.launch.agent_dir, &vm.launch.image], &disk, &root).map_err(|e| step("mounting the root", e))
}

/// The guest's network namespace, kept by a name in the scratch folder.
fn make_guest_namespace(vm: &Vm) -> Step<()> {
    unshare(CloneFlags::CLONE_NEWNET).map_err(|e| step("a network namespace", e))?;
    prove_apart(vm)?;
    network::configure_guest(std::process::id()).map_err(|e| step("the guest's network", e))?;
    let name = vm.scratch("netns");
    File::create(&name).map_err(|e| step("the guest's network", e))?;
    let none = None::<&str>;
    mount(Some("/proc/thread-self/ns/net"), &name, none, MsFlags::MS_BIND, none)
        .map_err(|e| step("keeping the guest's network", e))
}

pub(super) fn configure_network(vm: &Vm) -> Step<()> {
    let launch = &vm.launch;
    network::configure_gateway(launch.uplink.is_some()).map_err(|e| step("the gateway", e))?;
    let Some(uplink) = launch.uplink else { return Ok(()) };
    connect_uplink(vm, uplink, &launch.resolvers)?;
    on_host(vm, || filter::open_host(&launch.spec.id, &launch.spec.egress)).map_err(|e| step("the host's filter", e))
}

/// Makes the link to the host, and serves names from then on (the filter decides whether they may be asked).
pub(super) fn connect_uplink(vm: &Vm, uplink: Uplink, resolvers: &[SocketAddr]) -> Step<()> {
    network::configure_uplink(&vm.launch.spec.id, uplink, &vm.host_namespace, std::process::id())
        .map_err(|e| step("the uplink", e))?;
    // Another installation that is cleaned away takes the host's table along, unless it sees a link.
    if let Some(range) = vm.launch.uplinks {
        on_host(vm, || filter::ensure_host(range)).map_err(|e| format!("the host's filter: {e}"))?;
    }
    if vm.resolver.get().is_some() {
        return Ok(());
    }
    dns::serve(network::GATEWAY_V4, resolvers.to_vec(), &vm.host_namespace).map_err(|e| step("the resolver", e))?;
    let _ = vm.resolver.set(());
    Ok(())
}

/// Does something in the host's network namespace, on a thread of its own.
pub(super) fn on_host<T: Send, E: std::fmt::Display + Send>(
    vm: &Vm,
    work: impl FnOnce() -> Result<T, E> + Send,
) -> Step<T> {
    thread::scope(|scope| {
        let spawned = thread::Builder::new().name("host".into()).spawn_scoped(scope, || {
            nix::sched::setns(&vm.host_namespace, CloneFlags::CLONE_NEWNET).map_err(|e| e.to_string())?;
            work().map_err(|e| e.to_string())
        });
        join(spawned.map_err(|e| step("a thread", e))?)
    })
}

pub(super) fn watch_denied(vm: &Arc<Vm>, listener: Listener) -> Step<()> {
    let vm = Arc::clone(vm);
    let watch = move || {
        while let Ok(()) = listener.wait(|destination| {
            let text = destination.to_string();
            if vm.denied.lock().is_ok_and(|mut counts| counts.count(destination)) {
                vm.engine_log.line(format!("denied {text}"));
            }
        }) {}
    };
    let thread = thread::Builder::new().name("denied".into()).stack_size(128 * 1024);
    thread.spawn(watch).map(drop).map_err(|e| step("a thread", e))
}

/// What `runsc` must not see of the host's /proc. Its check that the network isn't the host's takes the presence of
/// `net/core/rmem_default` for the host's namespace, which newer kernels show in every one; [`prove_apart`] stands for
/// it. And the guest's memory is what it finds in /proc/meminfo.
fn hide_the_host(vm: &Vm) -> Step<()> {
    let none = None::<&str>;
    mount(Some("tiffin"), "/proc/sys/net", Some("tmpfs"), MsFlags::MS_RDONLY, none)
        .map_err(|e| step("hiding /proc/sys/net", e))?;
    let meminfo = vm.scratch("meminfo");
    fs::write(&meminfo, gvisor::meminfo(vm.launch.spec.size.mem_mb)).map_err(|e| step("the memory's size", e))?;
    mount(Some(&meminfo), "/proc/meminfo", none, MsFlags::MS_BIND, none).map_err(|e| step("the memory's size", e))
}

/// Starts the engine's launcher: it joins the VM's control groups, and waits at the gate.
fn spawn_engine(vm: &Vm, pid_file: &Path) -> Step<Child> {
    vm.group.create(vm.launch.spec.size, ENGINE_MEM_MB).map_err(|e| step("the control groups", e))?;
    vm.note_oom_kills();
    let door = vm.group.door().map_err(|e| step("the control groups", e))?;
    let mut command: Command = vm.with_paths(|paths| match vm.launch.restore {
        None => gvisor::run(paths, pid_file),
        Some(_) => gvisor::restore(paths, pid_file, &vm.folder.join(MEMORY)),
    });
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).env_clear();
    // SAFETY: entering only writes to open files.
    unsafe { command.pre_exec(move || door.enter()) };
    command.spawn().map_err(|e| step("starting runsc", e))
}

/// Listens to what the agent and the engine say from now on.
pub(super) fn listen_to(vm: &Arc<Vm>, child: &mut Child) -> Step<()> {
    if let Some(events) = child.stdout.take() {
        if vm.launch.spec.program.is_some() {
            // With less, each turn of the reader's stops a program that prints much. A kernel that refuses is only slower.
            let _ = fcntl(&events, FcntlArg::F_SETPIPE_SZ(CHANNEL_PIPE));
        }
        let of = Arc::clone(vm);
        vm.add_listener("channel", move || channel::follow(&of, events)).map_err(|e| step("a thread", e))?;
    }
    if let Some(console) = child.stderr.take() {
        let of = Arc::clone(vm);
        vm.add_listener("console", move || of.console.copy_from(console)).map_err(|e| step("a thread", e))?;
    }
    Ok(())
}

/// Tells the agent who it is.
///
/// Gives the way that it was told by: a machine takes its end for a cable that was pulled.
pub(super) fn boot_agent(vm: &Vm, child: &mut Child) -> Step<Option<ChildStdin>> {
    let mut line = serde_json::to_vec(&agent::first_identity(vm)).map_err(|e| step("the agent's boot line", e))?;
    line.push(b'\n');
    let mut stdin = child.stdin.take();
    if let Some(stdin) = &mut stdin {
        // A launcher that has ended doesn't read; its exit status says more than the broken pipe.
        let _ = stdin.write_all(&line);
    }
    Ok(stdin)
}

/// Makes the guest that was saved under `old_token` this VM, and then it is ready. On a thread, so that its end is noticed
/// meanwhile.
pub(super) fn rename_guest(vm: &Arc<Vm>, old_token: String, deadline: Instant) -> Step<()> {
    let vm = Arc::clone(vm);
    let rename = move || become_this(&vm, &old_token, deadline);
    let thread = thread::Builder::new().name("renew".into()).stack_size(128 * 1024);
    thread.spawn(rename).map(drop).map_err(|e| step("a thread", e))
}

/// Makes the guest whose agent takes `old_token` this VM, and then it is ready; or ends it.
pub(super) fn become_this(vm: &Vm, old_token: &str, deadline: Instant) {
    match agent::become_this(vm, old_token, deadline) {
        Ok(()) => vm.named(),
        // The boot's watch says so.
        Err(_) if Instant::now() >= deadline => {}
        Err(error) => {
            vm.errors.line(format!("renewing the guest: {error}"));
            vm.decide_end(EndReason::BootFailed, "the guest did not take its identity");
        }
    }
}

/// The launcher ends once the sandbox runs; it leaves its reason on standard error, which is the console's.
fn wait_for_launcher(vm: &Vm, child: &mut Child, deadline: Instant) -> Step<()> {
    match wait_until(child, deadline) {
        Ok(Some(status)) if status.success() => Ok(()),
        Ok(Some(status)) => Err(format!("runsc ended with {status}; the console has its words")),
        Ok(None) => {
            vm.decide_end(EndReason::BootTimeout, "the engine was not up in time");
            Err("runsc took too long".into())
        }
        Err(error) => Err(step("waiting for runsc", error)),
    }
}
