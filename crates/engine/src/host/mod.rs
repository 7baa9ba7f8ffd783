//! What the engines do to the host: processes, control groups, mounts, disks, network, packet filter.
//!
//! Each file owns one kind of host object. Names of objects that outlive a process derive from the VM's id, so that a
//! sweep finds leftovers. Nothing here decides anything about VMs.

pub mod cgroup;
pub mod denied;
pub mod descriptors;
pub mod disk;
pub mod dns;
pub mod filter;
pub mod flows;
pub mod live_copy;
pub mod mount;
pub mod network;
pub mod process;
