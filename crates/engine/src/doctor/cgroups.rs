//! Control groups, by making one with the limits of a small VM.

use tiffin_types::{id::VmId, vm::VmSize};

use super::{Check, DoctorInput};
use crate::host::cgroup::{Cgroups, ENGINE_MEM_MB};

const NAME: &str = "cgroups";

pub(super) fn check(_: &DoctorInput) -> Vec<Check> {
    let groups = match Cgroups::detect() {
        Ok(groups) => groups,
        Err(error) => {
            let remedy = "mount control groups (v2, or v1 with memory, cpu and pids) and enable these controllers";
            return vec![Check::fail(NAME, error.to_string(), remedy)];
        }
    };
    let empty = groups.all().is_empty();
    let group = groups.group(&VmId::random());
    let made = group.create(VmSize { cpus: 1, mem_mb: 128, disk_mb: 64 }, ENGINE_MEM_MB);
    let removed = group.remove();
    if empty {
        groups.remove_parent();
    }
    vec![match made.and(removed) {
        Ok(()) => {
            let version = groups.version();
            Check::ok(NAME, format!("{version}: limits on memory, CPU and processes can be set"))
        }
        Err(error) => {
            Check::fail(NAME, error.to_string(), "let root write to /sys/fs/cgroup (in a container: privileged)")
        }
    }]
}
