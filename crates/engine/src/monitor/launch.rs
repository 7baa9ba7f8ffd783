//! What the server and a VM's monitor tell each other: the files in the VM's folder and the words on its socket.
//!
//! The folder is the truth that outlives both. `spec.json` is written at create, `launch.json` at each start,
//! `run.json` by the monitor's first stage, `end.json` by the monitor as its last act.

use std::{
    fs,
    io::{self, Write},
    net::SocketAddr,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tiffin_logs::Limits;
use tiffin_types::vm::{EndReport, EngineName, VmSpec};

use crate::{
    Denied,
    host::{network::Uplink, process::ProcessId},
};

/// The VM as created.
pub const SPEC: &str = "spec.json";
/// The start that is under way, or was the last.
pub const LAUNCH: &str = "launch.json";
/// The monitor's process.
pub const RUN: &str = "run.json";
/// How the last run ended.
pub const END: &str = "end.json";
/// What the first start goes on from, while it hasn't been tried: the guest's saved identity. Written at create, removed
/// by the monitor the moment before the guest may run.
pub const RESTORE: &str = "restore.json";
/// The guest's saved memory and CPU state, beside [`RESTORE`].
pub const MEMORY: &str = "memory";
/// In [`MEMORY`], of a machine: the guest's memory.
pub const RAM: &str = "ram";
/// In [`MEMORY`], of a machine: the state of processor and devices.
pub const STATE: &str = "state";
/// The monitor's socket.
pub const SOCKET: &str = "monitor.sock";
/// The VM's writable layer.
pub const DISK: &str = "disk.ext4";
/// Beside `vms/`: a folder per VM with what its program printed. It outlives the VM.
pub const LOGS: &str = "logs";
/// What the monitor mounts, in its own mount namespace only.
pub const SCRATCH: &str = "mnt";
/// In the scratch folder: where the launcher writes its last words; first the gate at which it waits.
pub const LAUNCHER_LOG: &str = "launcher.log";

/// All that a monitor needs to know.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Launch {
    /// The VM.
    pub spec: VmSpec,
    /// What runs it.
    pub engine: EngineName,
    /// The image's mounted filesystem.
    pub image: PathBuf,
    /// The folder that holds the agent's program.
    pub agent_dir: PathBuf,
    /// The `runsc` program.
    pub runsc: PathBuf,
    /// The link to the host, when something outside is allowed.
    pub uplink: Option<Uplink>,
    /// Whom the DNS forwarder asks.
    pub resolvers: Vec<SocketAddr>,
    /// The agent's secret for this run.
    pub token: String,
    /// How long the guest has to come up, in milliseconds.
    pub boot_timeout_ms: u64,
    /// The range that the link's addresses are of.
    #[serde(default)]
    pub uplinks: Option<Ipv4Net>,
    /// The engine's release; snapshots of this run can be restored by no other.
    #[serde(default)]
    pub engine_version: String,
    /// Where the program's output is kept, and how much of it.
    #[serde(default)]
    pub log: Option<LogKeep>,
    /// The saved guest to go on from, instead of booting.
    #[serde(default)]
    pub restore: Option<Restore>,
    /// What the VM's machine is made of, where it has a kernel of its own. `image` is a file then, not a folder.
    #[serde(default)]
    pub machine: Option<MachineFiles>,
    /// Where the guest is saved to once it booted, before it is anybody's.
    #[serde(default)]
    pub template: Option<Template>,
}

/// A saved guest that others are to begin with.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Template {
    /// The folder that it is saved into; it is there, and removed again if it can't be.
    pub into: PathBuf,
    /// The agent's secret in it.
    pub token: String,
}

/// The host's files that a machine needs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MachineFiles {
    /// The QEMU program.
    pub qemu: PathBuf,
    /// The guest's kernel.
    pub kernel: PathBuf,
    /// The guest's first files.
    pub initramfs: PathBuf,
    /// Whether KVM is to run the guest's code.
    pub kvm: bool,
}

/// Where lines that a VM's program prints are kept, and how many.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LogKeep {
    /// The log's folder.
    pub folder: PathBuf,
    /// Bytes of all lines.
    pub total_bytes: u64,
    /// How long, in seconds.
    pub age_s: u64,
    /// Bytes of a line.
    pub line_bytes: usize,
}

impl LogKeep {
    /// In `folder`, within `limits`.
    pub fn new(folder: PathBuf, limits: Limits) -> Self {
        let Limits { total_bytes, age, line_bytes, .. } = limits;
        Self { folder, total_bytes, age_s: age.as_secs(), line_bytes }
    }

    /// For a start by a server that didn't say yet: where `vm`, a VM's folder, has its log by convention.
    pub(super) fn beside(vm: &Path) -> Self {
        let id = vm.file_name().unwrap_or_default();
        let data = vm.parent().and_then(Path::parent).unwrap_or(Path::new("/"));
        Self::new(data.join(LOGS).join(id), Limits::default())
    }

    /// The limits.
    pub fn limits(&self) -> Limits {
        Limits::new(self.total_bytes, Duration::from_secs(self.age_s), self.line_bytes)
    }
}

/// A saved guest, as the one that becomes another needs to know it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Restore {
    /// The agent's secret when it was saved.
    pub token: String,
    /// The folder of the agent that it runs, by its name.
    pub agent: String,
    /// The engine's release that saved it.
    pub engine_version: String,
    /// Whether it is a template: then a guest that doesn't come up from it can boot instead.
    #[serde(default)]
    pub template: bool,
}

/// The monitor's process, written before its first stage ends.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Run {
    /// The monitor.
    pub process: ProcessId,
    /// The host's boot that it belongs to.
    pub boot_id: String,
}

/// What a monitor can be asked: one line of JSON, one per connection.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "snake_case")]
pub enum Ask {
    /// Answered at once with [`Reply::Phase`].
    Phase,
    /// Answered with [`Reply::Ready`] once the guest is up, then with [`Reply::Ended`] once it is down.
    Watch,
    /// A TCP connection to the guest: [`Reply::Dialled`] with the descriptor beside it. It may still be on its way.
    Dial {
        /// The guest's port.
        port: u16,
    },
    /// Shut the guest down within the grace, then kill; answered with [`Reply::Ended`].
    Stop {
        /// Milliseconds between asking and killing.
        grace_ms: u64,
    },
    /// Kill at once; answered with [`Reply::Ended`].
    Kill,
    /// Freeze; [`Reply::Done`].
    Pause,
    /// Go on; [`Reply::Done`].
    Resume,
    /// What the network refused; [`Reply::Denied`].
    Denied,
    /// Start the program of the VM's spec, unless it runs. [`Reply::Done`], or [`Reply::ProgramFailed`].
    Program,
    /// Save memory, CPU state and disk into a folder; the guest goes on. [`Reply::Saved`], or [`Reply::Unsavable`],
    /// [`Reply::Full`].
    Save {
        /// The folder.
        into: PathBuf,
    },
    /// `launch.json` has another policy, and an uplink where it needs one: they hold from now on. [`Reply::Done`].
    Egress,
}

/// A monitor's answer: one line of JSON.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// Where the guest is.
    Phase {
        /// The phase.
        phase: Phase,
    },
    /// The guest is up.
    Ready,
    /// The guest is down and nothing of it is left but its folder.
    Ended {
        /// How it ended.
        report: EndReport,
    },
    /// The connection is begun.
    Dialled,
    /// It is done.
    Done,
    /// What the network refused.
    Denied {
        /// The counts.
        denied: Denied,
    },
    /// The program can't be started, and the guest ends.
    ProgramFailed,
    /// It is saved.
    Saved {
        /// For how many microseconds the guest stood still.
        paused_us: u64,
    },
    /// The guest can't be saved as it is.
    Unsavable {
        /// What is in the way.
        what: Unsavable,
    },
    /// The host's disk is full.
    Full,
    /// The guest's phase isn't one for that.
    NotRunning,
    /// Too much is asked at once, or a save lasts: it may be asked again.
    Busy,
    /// It can't be done.
    Refused {
        /// Why.
        message: String,
        /// The kernel's number for it, of a dial.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        errno: Option<i32>,
    },
}

impl Reply {
    /// It can't be done, for that reason.
    pub fn refused(message: String) -> Self {
        Self::Refused { message, errno: None }
    }
}

/// What a guest may have that an engine can't save.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unsavable {
    /// A TCP connection to somebody outside the guest, the server among them.
    OpenConnection,
    /// A file that is open and has no name any more.
    DeletedFile,
}

impl Unsavable {
    /// The VM's state, and the remedy.
    pub fn state(self) -> &'static str {
        match self {
            Self::OpenConnection => {
                "in touch with others, and can't be saved meanwhile: let the commands and file operations that run in it \
                 end, close its connections to the outside (one that it closed counts for another minute) and try again"
            }
            Self::DeletedFile => {
                "holding a deleted file open, and can't be saved meanwhile: end the program that does and try again"
            }
        }
    }
}

/// Where a guest is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// On its way up.
    Starting,
    /// The agent is ready.
    Running,
    /// Frozen.
    Paused,
    /// Down.
    Ended,
}

/// Reads one of the folder's files; `None` when it isn't there.
///
/// # Errors
/// When it can't be read or isn't what it should be.
pub fn read<T: DeserializeOwned>(dir: &Path, name: &str) -> io::Result<Option<T>> {
    match fs::read(dir.join(name)) {
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(io::Error::other),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Writes one of the folder's files, for root's eyes only: whole under its name, or not at all. `durable` waits for the
/// host's disk.
///
/// # Errors
/// The kernel's; a full disk among them.
pub fn write(dir: &Path, name: &str, value: &impl Serialize, durable: bool) -> io::Result<()> {
    let unfinished = dir.join(format!("{name}.tmp"));
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&unfinished)?;
    file.write_all(&serde_json::to_vec(value).map_err(io::Error::other)?)?;
    if durable {
        file.sync_all()?;
    }
    fs::rename(&unfinished, dir.join(name))?;
    // The name, too, has to outlive a power cut.
    if durable { fs::File::open(dir)?.sync_all() } else { Ok(()) }
}

/// Removes one of the folder's files; absent is fine.
///
/// # Errors
/// The kernel's.
pub fn remove(dir: &Path, name: &str) -> io::Result<()> {
    match fs::remove_file(dir.join(name)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
