//! Taking the platform off a host: what a server leaves running on purpose, ended without one.

use std::{
    fs, io,
    path::Path,
    time::{Duration, Instant},
};

use tiffin_types::id::VmId;

use super::{folder, images};
use crate::host::{cgroup::Cgroups, filter, mount::wait_detached, network::has_vm_links};

/// What was ended.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Cleaned {
    /// VMs that ran.
    pub vms: usize,
    /// Images that were mounted.
    pub images: usize,
}

/// Ends every VM of a data folder and clears what its server set up on the host: control groups, mounts, and, when no
/// other installation has VMs on the network, the host's packet filter. Disks and images stay. No server may run on the
/// folder meanwhile.
///
/// # Errors
/// The first thing that could not be cleared.
pub fn clean(data_dir: &Path, run_dir: &Path) -> io::Result<Cleaned> {
    let mut cleaned = Cleaned::default();
    let real = |dir: &Path| dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    let (data_dir, run_dir) = (real(data_dir), real(run_dir));
    let cgroups = Cgroups::detect()?;
    for entry in list(&data_dir.join("vms"))? {
        let dir = entry?.path();
        let Some(id) = dir.file_name().and_then(|name| name.to_str()?.parse::<VmId>().ok()) else { continue };
        let ended = end(&dir)?;
        if ended {
            filter::close_host_wholly(&id).map_err(io::Error::other)?;
        }
        cleaned.vms += usize::from(ended);
        let group = cgroups.group(&id);
        group.kill();
        group.remove()?;
    }
    for entry in list(&run_dir.join("images"))? {
        images::release(&entry?.path())?;
        cleaned.images += 1;
    }
    cgroups.remove_parent();
    if !has_vm_links()? {
        filter::remove_host().map_err(io::Error::other)?;
    }
    Ok(cleaned)
}

/// Ends one VM; tells whether it ran.
fn end(dir: &Path) -> io::Result<bool> {
    let Some(process) = folder::monitor(dir)? else { return Ok(false) };
    process.kill();
    let deadline = Instant::now() + Duration::from_secs(10);
    while process.is_alive() {
        if Instant::now() >= deadline {
            return Err(io::Error::new(io::ErrorKind::TimedOut, format!("the monitor of {} lives on", dir.display())));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    wait_detached(&dir.join(crate::monitor::launch::DISK), Duration::from_secs(10))?;
    Ok(true)
}

fn list(dir: &Path) -> io::Result<Box<dyn Iterator<Item = io::Result<fs::DirEntry>>>> {
    match fs::read_dir(dir) {
        Ok(entries) => Ok(Box::new(entries)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Box::new(std::iter::empty())),
        Err(error) => Err(error),
    }
}
