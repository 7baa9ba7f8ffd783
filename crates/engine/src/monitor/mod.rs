//! The monitor: one process per VM that outlives the server, owns everything the VM consists of, and records its end.
//!
//! ```text
//!   server --spawn--> first stage: binds the socket, leaves the host's namespaces, forks, writes run.json, ends
//!                        `--> monitor: PID 1 of the VM's PID namespace, in its mount and gateway network namespaces
//!                                 `--> runsc run -detach --> sandbox, gofer
//! ```
//!
//! Being PID 1 is the point: when the monitor ends, however it ends, the kernel kills every process in its namespace,
//! and with the last of them the mounts and interfaces vanish. What is left is the VM's folder and its control groups,
//! which the server sweeps.
//!
//! It is threads and blocking calls, no runtime: it must stay small, for there is one per VM.

mod agent;
mod boot;
mod channel;
mod control;
mod egress;
mod end;
mod gate;
mod jail;
pub mod launch;
pub mod log;
mod machine;
mod output;
mod pause;
mod program;
mod rest;
mod save;
mod state;
mod words;

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    net::IpAddr,
    os::unix::{fs::PermissionsExt, net::UnixListener},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use nix::{
    sched::{CloneFlags, unshare},
    unistd::{ForkResult, fork, setsid},
};

use self::{
    launch::{LAUNCH, Launch, RUN, Run, SOCKET, SPEC},
    state::Vm,
};
use tiffin_types::vm::EngineName;

use crate::host::{
    network,
    process::{ProcessId, boot_id},
};

/// What the first stage found on the host and hands to the monitor.
struct Host {
    /// The host's network namespace.
    namespace: File,
    /// Its identity, to prove that the VM's is another.
    namespace_id: (u64, u64),
    /// The host's own addresses.
    addresses: Vec<IpAddr>,
}

/// The `monitor` subcommand: `arguments` is the VM's folder. Must be called before any thread is started. The first
/// stage returns once the socket answers; the monitor itself never returns.
pub fn main(arguments: &[String]) -> ExitCode {
    let [folder] = arguments else {
        eprintln!("usage: tiffin monitor FOLDER");
        return ExitCode::from(2);
    };
    match first_stage(Path::new(folder)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{} monitor: {error}", tiffin_types::time::Timestamp::now());
            ExitCode::FAILURE
        }
    }
}

fn first_stage(folder: &Path) -> io::Result<()> {
    // Relative from here on: a socket's path has room for 107 bytes only.
    std::env::set_current_dir(folder)?;
    let folder = std::env::current_dir()?;
    let launch: Launch =
        launch::read(Path::new("."), LAUNCH)?.ok_or_else(|| io::Error::other("there is no launch.json"))?;
    if !matches!(launch.engine, EngineName::Gvisor | EngineName::Qemu) {
        return Err(io::Error::other(format!("the engine {} is not known here", launch.engine.as_str())));
    }
    setsid()?;
    // The modes of a guest's root folders must not depend on whoever started the server.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    let host = Host {
        namespace: File::open("/proc/self/ns/net")?,
        namespace_id: network::namespace_id()?,
        addresses: own_addresses()?,
    };
    launch::remove(Path::new("."), SOCKET)?;
    let socket = UnixListener::bind(SOCKET)?;
    fs::set_permissions(SOCKET, fs::Permissions::from_mode(0o600))?;
    unshare(CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC)?;
    let (named, namer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    // SAFETY: this process has one thread, so the child may do anything.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => {
            let process = ProcessId::of(child.as_raw()).ok_or_else(|| io::Error::other("the monitor ended at once"))?;
            launch::write(Path::new("."), RUN, &Run { process, boot_id: boot_id() }, false)?;
            // Whoever destroys the VM removes its spec before he looks for its monitor.
            if !Path::new(SPEC).exists() {
                return Err(io::Error::other("the VM was removed meanwhile"));
            }
            File::from(namer).write_all(b"n")
        }
        ForkResult::Child => {
            drop(namer);
            // A monitor that run.json doesn't name could be found by nobody: without it, it does nothing at all.
            if !matches!(File::from(named).read(&mut [0]), Ok(1)) {
                // SAFETY: _exit(2) has no preconditions.
                unsafe { libc::_exit(1) }
            }
            let code = monitor(folder, launch, host, socket);
            // The parent's destructors and exit handlers are not the child's business.
            // SAFETY: _exit(2) has no preconditions.
            unsafe { libc::_exit(code) }
        }
    }
}

/// The monitor, from its first instruction to its last.
fn monitor(folder: PathBuf, launch: Launch, host: Host, socket: UnixListener) -> i32 {
    // Before any thread, so that all share it; and not in the first stage, which still needs the host's /proc.
    let made = unshare(CloneFlags::CLONE_NEWNS).map_err(io::Error::from).and_then(|()| Vm::new(folder, launch, host));
    let vm = match made {
        Ok(vm) => Arc::new(vm),
        Err(error) => {
            eprintln!("monitor: {error}");
            return 1;
        }
    };
    if let Err(error) = control::serve(Arc::clone(&vm), socket) {
        vm.errors.line(format!("the control socket failed: {error}"));
        return 1;
    }
    let report = match boot::boot(&vm) {
        Ok(sandbox) => end::wait(&vm, sandbox),
        Err(report) => report,
    };
    end::finish(&vm, report);
    0
}

fn own_addresses() -> io::Result<Vec<IpAddr>> {
    let interfaces = nix::ifaddrs::getifaddrs()?;
    let addresses = interfaces.filter_map(|interface| {
        let address = interface.address?;
        match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
            (Some(v4), _) => Some(IpAddr::V4(v4.ip())),
            (_, Some(v6)) => Some(IpAddr::V6(v6.ip())),
            (None, None) => None,
        }
    });
    Ok(addresses.filter(|address| !address.is_loopback()).collect())
}
