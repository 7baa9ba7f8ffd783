//! gVisor: the bundle that `runsc` reads and the command lines that it takes.
//!
//! The root is a folder (an overlay of the image and the VM's disk) with none of gVisor's own overlays, so that the disk
//! has a size and outlives a stop. Control groups are joined before `runsc` starts (it would take longer to do it
//! itself), and the network namespace is given by path.

pub mod control;

use std::{path::Path, process::Command};

use serde_json::{Value, json};

use crate::monitor::launch::Unsavable;

/// The oldest release that the platform trusts: earlier ones lose checkpoints and have no systrap.
pub const MIN_RELEASE: u32 = 20_240_729;

/// The name of the one container in a VM's own `runsc` state folder.
const CONTAINER: &str = "vm";

/// Where a VM's monitor keeps what `runsc` needs.
#[derive(Debug, Clone, Copy)]
pub struct Paths<'a> {
    /// The `runsc` program.
    pub runsc: &'a Path,
    /// `runsc`'s own state, private to the VM.
    pub state: &'a Path,
    /// The bundle's folder.
    pub bundle: &'a Path,
    /// Where the launcher writes its last words before it looks at the bundle: it opens this first.
    pub log: &'a Path,
}

/// The bundle's `config.json` (OCI runtime specification 1.0) for a guest whose root is `root`, whose PID 1 is
/// `agent` (a path in the guest) and whose network is the namespace at `network`.
pub fn bundle_config(root: &Path, agent: &str, network: &Path, hostname: &str) -> Value {
    // PID 1 sets up the guest and drops privileges for what it runs: it needs root's usual rights inside the sandbox,
    // where they mean nothing to the host.
    let capabilities = json!([
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FOWNER",
        "CAP_FSETID",
        "CAP_KILL",
        "CAP_SETGID",
        "CAP_SETUID",
        "CAP_SETPCAP",
        "CAP_NET_BIND_SERVICE",
        "CAP_SYS_ADMIN",
        "CAP_SYS_CHROOT",
        "CAP_SYS_RESOURCE",
        "CAP_MKNOD",
        "CAP_SYS_PTRACE"
    ]);
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": { "uid": 0, "gid": 0 },
            "args": [agent],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "cwd": "/",
            "noNewPrivileges": false,
            "capabilities": {
                "bounding": capabilities, "effective": capabilities, "permitted": capabilities
            },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1_048_576, "soft": 65_536 }]
        },
        "root": { "path": root, "readonly": false },
        "hostname": hostname,
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"] },
            { "destination": "/dev/pts", "type": "devpts", "source": "devpts" },
            { "destination": "/dev/shm", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "mode=1777"] },
            { "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro", "nosuid", "nodev", "noexec"] },
            { "destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "mode=755"] }
        ],
        "linux": {
            "namespaces": [
                { "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" },
                { "type": "network", "path": network }
            ]
        }
    })
}

/// Starts the guest and returns once it runs; the sandbox's pid goes to `pid_file`.
pub fn run(paths: &Paths, pid_file: &Path) -> Command {
    let mut command = launcher(paths);
    command.args(["run", "-detach", "-bundle"]).arg(paths.bundle).arg("-pid-file").arg(pid_file).arg(CONTAINER);
    command
}

/// As [`run`], but the guest goes on from the state that [`checkpoint`] wrote to `image`. Its root must be a copy of what
/// it was at that moment.
pub fn restore(paths: &Paths, pid_file: &Path, image: &Path) -> Command {
    let mut command = launcher(paths);
    command.args(["restore", "-detach", "-bundle"]).arg(paths.bundle).arg("-image-path").arg(image);
    command.arg("-pid-file").arg(pid_file).arg(CONTAINER);
    command
}

/// Writes the guest's memory and CPU state to the folder `image`, and what it has not yet written of its files to its
/// root. A paused guest stays paused. What it does with an open TCP connection of the guest's to another host depends
/// on the release (20240729 fails, and leaves the connection deaf): there must be none.
pub fn checkpoint(paths: &Paths, image: &Path) -> Command {
    let mut command = runsc(paths);
    command.args(["checkpoint", "-leave-running", "-compression=none", "-image-path"]).arg(image).arg(CONTAINER);
    command
}

/// What the guest has that can't be saved, by what a failed [`checkpoint`] said; `None` when that wasn't it.
pub fn unsavable(said: &str) -> Option<Unsavable> {
    [
        ("unsupported networking state", Unsavable::OpenConnection),
        ("deleted and invalidated dentries", Unsavable::DeletedFile),
    ]
    .into_iter()
    .find_map(|(words, meaning)| said.contains(words).then_some(meaning))
}

/// Prints the release to standard output.
pub fn version(runsc: &Path) -> Command {
    let mut command = Command::new(runsc);
    command.arg("--version");
    command
}

/// Freezes the guest.
pub fn pause(paths: &Paths) -> Command {
    let mut command = runsc(paths);
    command.args(["pause", CONTAINER]);
    command
}

/// Lets the guest go on.
pub fn resume(paths: &Paths) -> Command {
    let mut command = runsc(paths);
    command.args(["resume", CONTAINER]);
    command
}

fn launcher(paths: &Paths) -> Command {
    let mut command = runsc(paths);
    command.arg("--log").arg(paths.log);
    command
}

fn runsc(paths: &Paths) -> Command {
    let mut command = Command::new(paths.runsc);
    command.arg("--root").arg(paths.state);
    command.args([
        "--platform=systrap",
        "--network=sandbox",
        "--overlay2=none",
        "--file-access=exclusive",
        "--host-uds=none",
        "--ignore-cgroups",
    ]);
    command
}

/// What `/proc/meminfo` says to `runsc`, which tells the guest that much.
pub fn meminfo(mem_mb: u32) -> String {
    let kib = u64::from(mem_mb) * 1024;
    format!("MemTotal: {kib} kB\nMemFree: {kib} kB\nMemAvailable: {kib} kB\n")
}
