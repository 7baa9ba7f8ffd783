//! What the engine is told about its host.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use ipnet::Ipv4Net;
use tiffin_logs::Limits;
use tiffin_types::vm::EngineName;

/// What QEMU and its guests are made of.
#[derive(Debug, Clone)]
pub struct MachinesConfig {
    /// The QEMU program.
    pub qemu: PathBuf,
    /// The guests' kernel: an uncompressed Linux that can be entered by PVH.
    pub kernel: PathBuf,
    /// The folder of that kernel's modules.
    pub modules: PathBuf,
    /// Whether KVM works here: then it runs the guests' code.
    pub kvm: bool,
    /// How many templates are kept: guests that were saved as they had booted, one for each image and size. With 0, all boot.
    pub templates: usize,
}

/// Where things are on this host and how its VMs are run.
#[derive(Debug, Clone)]
pub struct HostConfig {
    /// Images and VMs.
    pub data_dir: PathBuf,
    /// Mount points; need not outlive a restart of the host.
    pub run_dir: PathBuf,
    /// The `runsc` program, where there is one.
    pub runsc: Option<PathBuf>,
    /// What machines with a kernel of their own are run by, where there are any.
    pub machines: Option<MachinesConfig>,
    /// What runs VMs of which nobody says by what.
    pub engine: EngineName,
    /// The agent's program, static; copied into the data folder, so that it may be replaced while VMs run.
    pub agent: PathBuf,
    /// The program whose `monitor` subcommand is [`crate::monitor::main`].
    pub monitor: PathBuf,
    /// The range of the links between gateways and the host.
    pub uplinks: Ipv4Net,
    /// Whom the guests' names are asked of.
    pub resolvers: Vec<SocketAddr>,
    /// How long a guest has to come up.
    pub boot_timeout: Duration,
    /// How much is kept of what a VM's program prints.
    pub logs: Limits,
    /// Free space of the data folder's filesystem below which no VM is created or started, in MiB.
    pub min_free_disk_mb: u64,
}
