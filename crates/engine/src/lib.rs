//! Engines: what makes, runs and ends VMs on this host, and the one trait that hides which.
//!
//! ```text
//!   server --Engine--> monitored::Monitored --unix socket--> monitor (one process per VM, PID 1 of its own namespace)
//!                |                                              |-- driver: gvisor, or qemu (later firecracker)
//!                |                                              `-- host: disk, network, cgroup
//!                `---> fake::Fake (in process, scripted)
//! ```
//!
//! Invariants: nothing here knows SQL, HTTP or accounts. A VM's processes are children of its monitor and live in the
//! monitor's PID, mount and network namespaces, so the kernel removes all of them when the monitor ends, however it
//! ends. What outlives it (the VM's folder, its control groups) is named after the VM's id and swept.

pub mod agent;
pub mod api;
pub mod doctor;
pub mod fake;
pub mod gvisor;
pub mod host;
pub mod monitor;
pub mod monitored;
pub mod qemu;

use std::sync::Arc;

pub use api::*;

/// The engine of this host.
///
/// # Errors
/// [`EngineError::Host`] when the host can't be prepared, naming what failed.
pub fn open(config: monitored::HostConfig) -> Result<Arc<dyn Engine>, EngineError> {
    Ok(Arc::new(monitored::Monitored::open(config)?))
}
