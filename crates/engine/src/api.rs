//! The engine trait: the whole contract between the platform and what runs VMs.
//!
//! The life of a VM, as an engine sees it:
//!
//! ```text
//!   (absent) --create[_from]--> Stopped --start--> Running --stop--> Stopped --destroy--> (absent)
//!                                            | ^  \
//!                                       pause| |resume  `--(ends by itself)--> Stopped, with an EndReport
//!                                            v |
//!                                           Paused
//! ```
//!
//! A VM whose spec has a program boots as any other and does nothing; [`Engine::program_start`] starts the program then, or
//! later (so a VM can be booted ahead and stand still meanwhile). With the program, the VM ends.
//!
//! An engine observes; it never decides. Which request is allowed in which state, whose VM it is and what to do after
//! an end is the business of the layers above. Every call is idempotent where that means something: creating what exists
//! with the same spec, stopping what is down and destroying what is absent succeed. Starting what is up is refused. Calls for one VM must not overlap,
//! except `observe`, `dial` and `destroy`, which may come at any time; calls for different VMs run at once.

use std::{pin::Pin, time::Duration};

use async_trait::async_trait;
use tiffin_types::{
    id::{Digest, SnapshotId, VmId},
    network::EgressPolicy,
    vm::{EndReport, EngineName, Isolation, VmSpec},
};
use tokio::io::{AsyncRead, AsyncWrite};

/// A stream into a guest.
pub trait Stream: AsyncRead + AsyncWrite + Send + Sync + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin> Stream for T {}

/// A connection into a guest, whatever it runs over.
pub type Connection = Pin<Box<dyn Stream>>;

/// What an engine can't do is refused above with a clear error, never emulated badly.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// `pause` and `resume` work.
    pub pause: bool,
    /// Memory, CPU state and disk can be saved and restored.
    pub snapshot: bool,
    /// VMs boot the kernel that their image came with, where it did.
    pub kernels: bool,
}

/// A kind of VM that can be had here: by its engine's name, what it isolates and what it can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kind {
    /// The engine.
    pub name: EngineName,
    /// What stands between its guests and the host.
    pub isolation: Isolation,
    /// What it can do.
    pub capabilities: Capabilities,
}

/// What an engine sees of a VM at this moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Observed {
    /// Nothing of it exists.
    Absent,
    /// It exists and doesn't run. `end` tells how its last run ended; `None` when it never ran.
    Stopped {
        /// How the last run ended.
        end: Option<EndReport>,
    },
    /// On its way up.
    Starting,
    /// The agent has said that it is ready.
    Running,
    /// Its processes stand still.
    Paused,
    /// It can't be told right now (the monitor doesn't answer); ask again.
    Unknown,
}

/// A VM that came up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Started {
    /// From the call to the agent's ready.
    pub took: Duration,
    /// Whether it went on from what was saved, instead of booting: from its snapshot, or from one that the engine keeps of guests
    /// that have just booted.
    pub from_saved: bool,
}

/// A VM's run ended, by whatever cause. Sent once per run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// The VM.
    pub id: VmId,
    /// How.
    pub report: EndReport,
}

/// Where a dial goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// The agent.
    Agent,
    /// A TCP port on the guest's address. The agent's port is refused.
    Port(u16),
}

/// A connection that the packet filter denied, counted.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DeniedConnection {
    /// Destination address.
    pub address: std::net::IpAddr,
    /// `tcp`, `udp`, `icmp` or the protocol's number.
    pub protocol: String,
    /// Destination port, where the protocol has ports.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// Packets denied.
    pub count: u64,
}

/// What a VM's network has refused so far. Bounded: after 256 destinations only the total grows.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Denied {
    /// Packets denied in this run, as far as they were told of: of a flood, 50 a second are.
    pub total: u64,
    /// By destination, first seen first.
    pub destinations: Vec<DeniedConnection>,
}

/// Which of a VM's logs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogKind {
    /// The engine's and the monitor's own words, denied connections among them.
    Engine,
    /// What the guest wrote to its console.
    Console,
    /// The engine's errors.
    EngineErrors,
}

/// The last lines of a log.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogTail {
    /// Lines, oldest first, without line ends; invalid UTF-8 replaced; each cut at 16 KiB.
    pub lines: Vec<String>,
    /// Whether there were more lines before.
    pub truncated: bool,
    /// When the log was last written, as milliseconds since the Unix epoch; `None` when there is none.
    pub updated_at_ms: Option<i64>,
}

/// Why an engine's call failed, by what the caller does about it.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The VM doesn't exist here.
    #[error("no such VM on this host")]
    Absent,
    /// The VM is not in a state for that.
    #[error("the VM is {0}")]
    WrongState(&'static str),
    /// The host has no room (memory, disk, processes, addresses): refuse, and try later.
    #[error("the host has no room: {0}")]
    NoCapacity(String),
    /// The VM came up wrongly and is down again; the report says why.
    #[error("{}", .0.message)]
    Ended(EndReport),
    /// This engine can't do that.
    #[error("engine {engine} can't {what}")]
    Unsupported {
        /// The engine.
        engine: &'static str,
        /// What it can't.
        what: &'static str,
    },
    /// The spec or the image is of no use to this engine.
    #[error("{0}")]
    Invalid(String),
    /// The snapshot can't be restored here, ever; says why.
    #[error("{0}")]
    BadSnapshot(String),
    /// Something on the host failed.
    #[error("{context}")]
    Host {
        /// What was being done.
        context: String,
        /// What failed.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl EngineError {
    /// A failure of the host while doing `context`.
    pub fn host(context: impl Into<String>, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Host { context: context.into(), source: source.into() }
    }
}

/// A VM that was saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Saved {
    /// Room that the snapshot takes on the host's disk, in bytes.
    pub size_bytes: u64,
    /// For how long the VM stood still.
    pub paused: Duration,
}

/// What runs VMs.
#[async_trait]
pub trait Engine: Send + Sync + 'static {
    /// The kinds of VMs that can be had.
    fn kinds(&self) -> &[Kind];

    /// The one of them for those who don't say which.
    fn default_kind(&self) -> Kind;

    /// The kind of that name, if it can be had.
    fn kind(&self, name: EngineName) -> Option<Kind> {
        self.kinds().iter().find(|kind| kind.name == name).copied()
    }

    /// What VMs of that engine can do; nothing, where it can't be had.
    fn capabilities(&self, name: EngineName) -> Capabilities {
        self.kind(name).map(|kind| kind.capabilities).unwrap_or_default()
    }

    /// Makes the VM's folder and disk; nothing runs. `image` in the spec, and `kernel` where there is one, must be in the blob
    /// store and stay there while the VM exists. An engine that boots no kernels refuses a spec with one
    /// ([`EngineError::Unsupported`]). On failure nothing is left.
    async fn create(&self, spec: &VmSpec) -> Result<(), EngineError>;

    /// Brings a created or stopped VM up and returns when its agent is ready. On failure it is down again, and
    /// [`EngineError::Ended`] says why where the VM itself was the cause. Dropping the future doesn't stop the start.
    async fn start(&self, id: &VmId) -> Result<Started, EngineError>;

    /// Starts the program of a running VM's spec, and returns when it runs; once it does, another call changes nothing. A VM
    /// without one is [`EngineError::Invalid`]. Where it can't be started (there is no such file or user, ...) the VM is down
    /// again, and [`EngineError::Ended`] says why, by [`EndReason::ProgramFailed`](tiffin_types::vm::EndReason). Each start
    /// of the VM needs a new call, but one that goes on from a snapshot with a running program: there the call finds it.
    ///
    /// What the program prints is logged below `<data_dir>/logs/<VM's id>/`, whether a server is there or not, and outlives
    /// the VM: it isn't the engine's to remove. When the program ends, all in the VM is ended and the end is reported as
    /// [`EndReason::Exited`](tiffin_types::vm::EndReason); it may come at once, and before this returns.
    async fn program_start(&self, id: &VmId) -> Result<(), EngineError>;

    /// As [`Engine::create`], with the disk of a snapshot, and the first start goes on where the snapshot was taken
    /// instead of booting; each later one boots. The VM becomes itself before that start returns: host name, machine
    /// id, token, addresses, clock and the kernel's random state are its own, and two VMs of one snapshot share nothing.
    /// `spec` must name the image, kernel, CPUs, memory and disk of the snapshot ([`EngineError::Invalid`]); its egress is its
    /// own. A snapshot that is damaged, was made by another host or by an engine that this one can't take over from is
    /// [`EngineError::BadSnapshot`]. Once this returned, the snapshot may be removed.
    async fn create_from(&self, spec: &VmSpec, snapshot: &SnapshotId) -> Result<(), EngineError>;

    /// Saves a running or paused VM's memory, CPU state and disk under a new name; the VM goes on as it was, and what runs
    /// in it isn't disturbed. On failure nothing is left of the snapshot and the VM goes on too. A VM that has something
    /// which the engine can't save (gVisor: an open connection, an operation of the agent's among them; a deleted file that
    /// is open) is [`EngineError::WrongState`], with what it is and what to do about it.
    async fn snapshot_save(&self, id: &VmId, into: &SnapshotId) -> Result<Saved, EngineError>;

    /// Removes a snapshot; absent is fine.
    async fn snapshot_remove(&self, snapshot: &SnapshotId) -> Result<(), EngineError>;

    /// The snapshots on this host that are whole. What a killed save left is removed by [`Engine::adopt`].
    async fn snapshot_list(&self) -> Result<Vec<SnapshotId>, EngineError>;

    /// Changes what a VM may reach outside, from now on and for later starts. In a running VM connections that are no
    /// longer allowed stop working, and names are answered exactly when something is allowed.
    async fn set_egress(&self, id: &VmId, egress: &EgressPolicy) -> Result<(), EngineError>;

    /// Shuts a running or paused VM down: the guest's processes have `grace` to end, then all is killed. A program is asked by
    /// its own signal, and before the others. The disk stays.
    async fn stop(&self, id: &VmId, grace: Duration) -> Result<EndReport, EngineError>;

    /// Freezes a running VM.
    async fn pause(&self, id: &VmId) -> Result<(), EngineError>;

    /// Lets a paused VM go on.
    async fn resume(&self, id: &VmId) -> Result<(), EngineError>;

    /// Removes the VM, at once and in any state: processes, network, control groups, disk, folder.
    async fn destroy(&self, id: &VmId) -> Result<(), EngineError>;

    /// What the engine sees of the VM now.
    async fn observe(&self, id: &VmId) -> Observed;

    /// Called once when the server starts, before any other call: finds every VM that this engine left on the host,
    /// goes on watching those that run (their end arrives in [`Engine::next_end`]), clears what half-made and dead VMs
    /// left outside their folders, and tells what it saw.
    async fn adopt(&self) -> Result<Vec<(VmId, Observed)>, EngineError>;

    /// Lets go of an image, so that removing its blob frees the disk; whether nothing of it is held any more. An image that a
    /// VM here was made of stays as it is, and one that isn't held is let go of already. The caller sees to it that no VM is made of
    /// the image meanwhile.
    async fn image_release(&self, image: &Digest) -> Result<bool, EngineError>;

    /// Opens a connection into a running guest. Where the guest refuses it (nothing listens) or doesn't answer, it is
    /// [`EngineError::Host`] and its source the [`std::io::Error`] of the connect.
    async fn dial(&self, id: &VmId, target: Target) -> Result<Connection, EngineError>;

    /// The secret that the VM's agent asks for.
    async fn agent_token(&self, id: &VmId) -> Result<String, EngineError>;

    /// The next end of a VM's run, in the order they were noticed. One caller at a time. An end that `stop`, `destroy`
    /// or a failed `start` has returned is not repeated here.
    async fn next_end(&self) -> Ended;

    /// The last `lines` of one of the VM's logs. They outlive the run, not the VM.
    async fn log_tail(&self, id: &VmId, kind: LogKind, lines: usize) -> Result<LogTail, EngineError>;

    /// What the VM's network has refused in its present run.
    async fn denied(&self, id: &VmId) -> Result<Denied, EngineError>;
}
