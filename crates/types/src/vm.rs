//! What a VM is asked to be, the states it goes through, and why it ended.
//!
//! ```text
//!   CREATED --start--> STARTING --ready--> RUNNING --stop--> STOPPING --ended--> STOPPED --start--> STARTING
//!                          |                 |  ^                |
//!                          |            pause|  |resume          |
//!                          |                 v  |                |
//!                          |               PAUSED --stop--> STOPPING
//!                          |                 |                   |
//!                          +------fail-------+-------fail--------+---> ERROR --start--> STARTING
//!   CREATED --prepared--> STOPPED          every state but DELETED --delete--> DELETED
//! ```
//!
//! The program's own end (`ended`) takes RUNNING and PAUSED to STOPPED; an end that nobody asked for and that isn't
//! the program's own (`fail`: out of memory, engine lost) takes any live state to ERROR with its reason.

use serde::{Deserialize, Serialize};

use crate::{
    id::{Digest, VmId},
    network::EgressPolicy,
    program::Program,
};

/// A VM's durable state, by its name in the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum VmState {
    /// Known and prepared; never ran.
    Created,
    /// The engine is bringing it up.
    Starting,
    /// The agent in it answers.
    Running,
    /// Its processes stand still; memory is kept.
    Paused,
    /// Shutting down on request.
    Stopping,
    /// Down; its disk is kept.
    Stopped,
    /// Ended by something that nobody asked for; the reason says what.
    Error,
    /// Gone; only its record is left.
    Deleted,
}

/// What moves a VM from one state to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum VmEvent {
    /// It is made, and to be started later.
    Prepared,
    /// A request to run it.
    Start,
    /// The agent answered.
    Ready,
    /// A request to freeze it.
    Pause,
    /// A request to go on after a pause.
    Resume,
    /// A request to shut it down.
    Stop,
    /// It is down, by request or because its program ended.
    Ended,
    /// It is down for a reason that nobody asked for.
    Fail,
    /// A request to remove it.
    Delete,
}

impl VmState {
    /// Every state.
    pub const ALL: [VmState; 8] = [
        VmState::Created,
        VmState::Starting,
        VmState::Running,
        VmState::Paused,
        VmState::Stopping,
        VmState::Stopped,
        VmState::Error,
        VmState::Deleted,
    ];

    /// The one transition table: where `event` takes a VM in this state, or `None` where it is refused.
    pub fn after(self, event: VmEvent) -> Option<VmState> {
        use VmEvent as E;
        use VmState as S;
        match (self, event) {
            (S::Created, E::Prepared) => Some(S::Stopped),
            (S::Created | S::Stopped | S::Error, E::Start) => Some(S::Starting),
            (S::Starting, E::Ready) => Some(S::Running),
            (S::Running, E::Pause) => Some(S::Paused),
            (S::Paused, E::Resume) => Some(S::Running),
            (S::Running | S::Paused, E::Stop) => Some(S::Stopping),
            (S::Running | S::Paused | S::Stopping, E::Ended) => Some(S::Stopped),
            (S::Starting | S::Running | S::Paused | S::Stopping, E::Fail) => Some(S::Error),
            (S::Created | S::Starting | S::Running | S::Paused | S::Stopping | S::Stopped | S::Error, E::Delete) => {
                Some(S::Deleted)
            }
            (S::Created | S::Stopped | S::Error, E::Ready | E::Pause | E::Resume | E::Stop | E::Ended | E::Fail)
            | (S::Starting, E::Prepared | E::Start | E::Pause | E::Resume | E::Stop | E::Ended)
            | (S::Running, E::Prepared | E::Start | E::Ready | E::Resume)
            | (S::Paused, E::Prepared | E::Start | E::Ready | E::Pause)
            | (S::Stopping, E::Prepared | E::Start | E::Ready | E::Pause | E::Resume | E::Stop)
            | (S::Stopped | S::Error, E::Prepared)
            | (
                S::Deleted,
                E::Prepared | E::Start | E::Ready | E::Pause | E::Resume | E::Stop | E::Ended | E::Fail | E::Delete,
            ) => None,
        }
    }

    /// Whether an engine process may exist for a VM in this state.
    pub fn is_live(self) -> bool {
        match self {
            VmState::Starting | VmState::Running | VmState::Paused | VmState::Stopping => true,
            VmState::Created | VmState::Stopped | VmState::Error | VmState::Deleted => false,
        }
    }

    /// The state's name in the API and in the store.
    pub fn as_str(self) -> &'static str {
        match self {
            VmState::Created => "CREATED",
            VmState::Starting => "STARTING",
            VmState::Running => "RUNNING",
            VmState::Paused => "PAUSED",
            VmState::Stopping => "STOPPING",
            VmState::Stopped => "STOPPED",
            VmState::Error => "ERROR",
            VmState::Deleted => "DELETED",
        }
    }
}

impl std::fmt::Display for VmState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for VmState {
    type Err = UnknownState;
    fn from_str(text: &str) -> Result<Self, UnknownState> {
        VmState::ALL.into_iter().find(|state| state.as_str() == text).ok_or(UnknownState)
    }
}

/// The text is no state's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a VM state")]
pub struct UnknownState;

/// Why a VM that ran is down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndReason {
    /// Stopped or deleted on request.
    Requested,
    /// The program that it was started for ended by itself.
    Exited,
    /// The program that it was to run could not be started.
    ProgramFailed,
    /// It went over its memory limit.
    Oom,
    /// The agent didn't answer in time at boot.
    BootTimeout,
    /// The engine could not bring it up.
    BootFailed,
    /// The agent in the guest died, though the engine lived on.
    AgentLost,
    /// The engine process ended by itself or was killed.
    EngineLost,
    /// The VM's monitor was killed; the VM went down with it.
    MonitorLost,
    /// The host restarted while it ran.
    HostRestarted,
}

impl EndReason {
    /// Every reason.
    pub const ALL: [EndReason; 10] = [
        EndReason::Requested,
        EndReason::Exited,
        EndReason::ProgramFailed,
        EndReason::Oom,
        EndReason::BootTimeout,
        EndReason::BootFailed,
        EndReason::AgentLost,
        EndReason::EngineLost,
        EndReason::MonitorLost,
        EndReason::HostRestarted,
    ];

    /// The reason's name in the API (`error.code`) and in the store.
    pub fn as_str(self) -> &'static str {
        match self {
            EndReason::Requested => "requested",
            EndReason::Exited => "exited",
            EndReason::ProgramFailed => "program_failed",
            EndReason::Oom => "oom",
            EndReason::BootTimeout => "boot_timeout",
            EndReason::BootFailed => "boot_failed",
            EndReason::AgentLost => "agent_lost",
            EndReason::EngineLost => "engine_lost",
            EndReason::MonitorLost => "monitor_lost",
            EndReason::HostRestarted => "host_restarted",
        }
    }

    /// Whether this end is as asked for ([`VmEvent::Ended`]) or a failure ([`VmEvent::Fail`]).
    pub fn event(self) -> VmEvent {
        match self {
            EndReason::Requested | EndReason::Exited => VmEvent::Ended,
            EndReason::ProgramFailed
            | EndReason::Oom
            | EndReason::BootTimeout
            | EndReason::BootFailed
            | EndReason::AgentLost
            | EndReason::EngineLost
            | EndReason::MonitorLost
            | EndReason::HostRestarted => VmEvent::Fail,
        }
    }
}

impl std::str::FromStr for EndReason {
    type Err = UnknownReason;
    fn from_str(text: &str) -> Result<Self, UnknownReason> {
        EndReason::ALL.into_iter().find(|reason| reason.as_str() == text).ok_or(UnknownReason)
    }
}

/// The text is no end reason's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an end reason")]
pub struct UnknownReason;

/// How a VM ended: the reason, and what is known beyond it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndReport {
    /// The typed reason.
    pub reason: EndReason,
    /// One sentence for a person: what happened, with figures where there are any. Names nothing of the host.
    pub message: String,
    /// The exit code of the program that the VM was started for, or 128 + the number of the signal that ended it, where
    /// that is known: always when it ended by itself, 126 or 127 when it could not be started (as shells have it).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
}

/// Which engine runs a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineName {
    /// gVisor: a userspace kernel (`runsc`).
    Gvisor,
    /// QEMU microvm.
    Qemu,
    /// Firecracker.
    Firecracker,
    /// A scripted stand-in for tests of the layers above. Isolates nothing, runs nothing.
    Fake,
}

impl EngineName {
    /// The engine's name in the configuration and in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            EngineName::Gvisor => "gvisor",
            EngineName::Qemu => "qemu",
            EngineName::Firecracker => "firecracker",
            EngineName::Fake => "fake",
        }
    }
}

impl std::str::FromStr for EngineName {
    type Err = UnknownEngine;
    fn from_str(text: &str) -> Result<Self, UnknownEngine> {
        [EngineName::Gvisor, EngineName::Qemu, EngineName::Firecracker, EngineName::Fake]
            .into_iter()
            .find(|engine| engine.as_str() == text)
            .ok_or(UnknownEngine)
    }
}

/// The text is no engine's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be one of gvisor, qemu, firecracker")]
pub struct UnknownEngine;

/// What stands between a guest and the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Isolation {
    /// A kernel in userspace that serves the guest's system calls (gVisor).
    UserspaceKernel,
    /// A kernel of its own on hardware virtualization.
    HardwareVm,
    /// A kernel of its own on an emulated CPU; the emulator is no supported security boundary.
    EmulatedVm,
    /// None (the fake engine).
    None,
}

impl Isolation {
    /// The name in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Isolation::UserspaceKernel => "userspace-kernel",
            Isolation::HardwareVm => "hardware-vm",
            Isolation::EmulatedVm => "emulated-vm",
            Isolation::None => "none",
        }
    }
}

/// How long a VM is kept that was made to run its image's program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Lifetime {
    /// For one run: its end deletes it.
    OneTime,
    /// Until it is destroyed: it can be started again and again, with the disk that it left.
    Cached,
}

impl Lifetime {
    /// The name in the store.
    pub fn as_str(self) -> &'static str {
        match self {
            Lifetime::OneTime => "one_time",
            Lifetime::Cached => "cached",
        }
    }
}

impl std::str::FromStr for Lifetime {
    type Err = UnknownLifetime;
    fn from_str(text: &str) -> Result<Self, UnknownLifetime> {
        [Lifetime::OneTime, Lifetime::Cached].into_iter().find(|one| one.as_str() == text).ok_or(UnknownLifetime)
    }
}

/// The text is no lifetime's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be one_time or cached")]
pub struct UnknownLifetime;

/// What a VM is beyond a sandbox: it was made to run its image's program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Service {
    /// How long it is kept.
    pub lifetime: Lifetime,
    /// The port that its program listens on, if it is to be reached.
    pub port: Option<u16>,
    /// The disk that was asked for, in GB of 1024 MiB; `None`: the default.
    pub volume_gb: Option<u32>,
}

/// How a VM came up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProvisionMode {
    /// Booted afresh.
    Boot,
    /// Restored from a snapshot.
    Snapshot,
}

/// vCPUs, memory and disk of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct VmSize {
    /// vCPUs.
    pub cpus: u32,
    /// Memory, in MiB.
    pub mem_mb: u32,
    /// Writable layer, in MiB.
    pub disk_mb: u32,
}

/// All that an engine needs to know to make a VM. Written once, at create; a start reads it again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSpec {
    /// The VM.
    pub id: VmId,
    /// The image's filesystem, by content.
    pub image: Digest,
    /// The kernel that it boots, by content, where its image came with one; else the engine's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<Digest>,
    /// Its size.
    pub size: VmSize,
    /// What it may reach outside.
    pub egress: EgressPolicy,
    /// What runs it.
    #[serde(default = "first_engine")]
    pub engine: EngineName,
    /// The program that it is for, if it is for one. Holds secrets: it is kept in the VM's folder and nowhere else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub program: Option<Program>,
}

/// What ran every VM before there was another engine.
fn first_engine() -> EngineName {
    EngineName::Gvisor
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_leaves_deleted_and_everything_can_get_there() {
        for state in VmState::ALL {
            let after = state.after(VmEvent::Delete);
            assert_eq!(after.is_some(), state != VmState::Deleted);
        }
        for event in [VmEvent::Prepared, VmEvent::Start, VmEvent::Ready, VmEvent::Stop, VmEvent::Ended, VmEvent::Fail] {
            assert_eq!(VmState::Deleted.after(event), None);
        }
    }

    #[test]
    fn only_a_live_vm_can_end() {
        for state in VmState::ALL {
            assert_eq!(state.after(VmEvent::Fail).is_some(), state.is_live(), "{state}");
        }
    }

    #[test]
    fn names_parse_back() {
        for state in VmState::ALL {
            assert_eq!(state.as_str().parse(), Ok(state));
            assert_eq!(serde_json::to_value(state).unwrap(), state.as_str());
        }
        for reason in EndReason::ALL {
            assert_eq!(reason.as_str().parse(), Ok(reason));
            assert_eq!(serde_json::to_value(reason).unwrap(), reason.as_str());
        }
    }
}
