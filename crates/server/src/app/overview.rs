//! What there is, and how much of the host is taken.

use tiffin_image::blob::BlobStore;
use tiffin_store::Figures;
use tiffin_types::{account::Scope, vm::VmState};

use super::{App, auth::Caller};
use crate::error::AppError;

/// The installation at a glance.
pub(crate) struct Overview {
    /// VMs that are not deleted, by state; every state.
    pub(crate) vms: Vec<(VmState, u64)>,
    /// What the store counts.
    pub(crate) figures: Figures,
    /// Images' files that were found damaged.
    pub(crate) damaged: usize,
    /// The host.
    pub(crate) host: Host,
}

/// What the host has, as far as it can be read.
pub(crate) struct Host {
    pub(crate) cpus: u64,
    /// Processes that run or want to, over the last minute.
    pub(crate) load: Option<f64>,
    pub(crate) mem_total_mb: Option<u64>,
    pub(crate) mem_available_mb: Option<u64>,
    /// Of the data folder's filesystem.
    pub(crate) disk_total_mb: Option<u64>,
    pub(crate) disk_available_mb: Option<u64>,
}

/// Looks at the store and the host.
pub(crate) async fn overview_get(app: &App, caller: &Caller) -> Result<Overview, AppError> {
    caller.require(Scope::Admin)?;
    let counts = app.store.vm_counts().await?;
    let count = |state| counts.iter().find(|(other, _)| *other == state).map_or(0, |(_, count)| *count);
    let states = VmState::ALL.into_iter().filter(|state| *state != VmState::Deleted);
    let vms = states.map(|state| (state, u64::try_from(count(state)).unwrap_or(0))).collect();
    let data_dir = app.config.data_dir.clone();
    let stores = [app.images.filesystems.clone(), app.images.kernels.clone()];
    let looked = tokio::task::spawn_blocking(move || {
        (look(data_dir.as_std_path()), stores.iter().map(BlobStore::damaged_count).sum())
    });
    let (host, damaged) = looked.await.map_err(|error| AppError::internal("looking at the host", error))?;
    Ok(Overview { vms, figures: app.store.figures().await?, damaged, host })
}

fn look(data_dir: &std::path::Path) -> Host {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let load = std::fs::read_to_string("/proc/loadavg").ok();
    let disk = nix::sys::statvfs::statvfs(data_dir).ok();
    // The size of a block and counts of blocks are of the platform's types.
    let mb = |blocks: u64, block: u64| blocks.saturating_mul(block) >> 20;
    Host {
        cpus: std::thread::available_parallelism().map_or(1, |count| count.get() as u64),
        load: load.and_then(|text| text.split_whitespace().next()?.parse().ok()),
        mem_total_mb: meminfo_mb(&meminfo, "MemTotal:"),
        mem_available_mb: meminfo_mb(&meminfo, "MemAvailable:"),
        disk_total_mb: disk.map(|disk| mb(disk.blocks(), disk.fragment_size())),
        disk_available_mb: disk.map(|disk| mb(disk.blocks_available(), disk.fragment_size())),
    }
}

fn meminfo_mb(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? >> 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_as_the_kernel_writes_it() {
        let text = "MemTotal:        8123456 kB\nMemFree:  1 kB\nMemAvailable:    2048 kB\n";
        assert_eq!((meminfo_mb(text, "MemTotal:"), meminfo_mb(text, "MemAvailable:")), (Some(7933), Some(2)));
        assert_eq!((meminfo_mb(text, "Nope:"), meminfo_mb("MemTotal: x", "MemTotal:")), (None, None));
    }

    #[test]
    fn this_host_can_be_looked_at() {
        let host = look(std::path::Path::new("/"));
        assert!(
            host.cpus >= 1 && host.mem_total_mb > host.mem_available_mb && host.disk_total_mb >= host.disk_available_mb
        );
        assert_eq!(look(std::path::Path::new("/nonexistent")).disk_total_mb, None);
    }
}
