//! What the engine is told about its host.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use ipnet::Ipv4Net;
use tiffin_logs::Limits;

/// Where things are on this host and how its VMs are run.
#[derive(Debug, Clone)]
pub struct HostConfig {
    /// Images and VMs.
    pub data_dir: PathBuf,
    /// Mount points; need not outlive a restart of the host.
    pub run_dir: PathBuf,
    /// The `runsc` program.
    pub runsc: PathBuf,
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
