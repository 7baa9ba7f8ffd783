//! Room and rights where VMs live and images are mounted.

use std::{fs, io};

use camino::Utf8Path;
use nix::sys::statfs::{self, FsType, statfs};

use super::{Check, DoctorInput};
use crate::host::mount::free_bytes;

/// Below this not even the default image fits.
const FLOOR_BYTES: u64 = 1 << 30;
/// Below this a handful of VMs fills it.
const COMFORT_BYTES: u64 = 5 << 30;

pub(super) fn check(input: &DoctorInput) -> Vec<Check> {
    vec![data(&input.data_dir), run(&input.run_dir)]
}

fn data(dir: &Utf8Path) -> Check {
    let name = "data folder";
    let remedy = "choose a folder on a disk with room, with the setting data_dir";
    let held = existing(dir);
    // A server must get at the VMs that have filled the disk: who else would delete them.
    let has_vms = dir.join("vms").is_dir();
    let full = "make room, or delete VMs: no more come up";
    match writable(held) {
        Err(error) if has_vms && error.kind() == io::ErrorKind::StorageFull => {
            return Check::warn(name, format!("{dir} is full"), full);
        }
        Err(error) => return Check::fail(name, format!("{held} can't be written: {error}"), remedy),
        Ok(()) => {}
    }
    let free = match free_bytes(held.as_std_path()) {
        Ok(free) => free,
        Err(error) => return Check::fail(name, format!("{held}: {error}"), remedy),
    };
    let kind = statfs(held.as_std_path()).map_or("unknown", |stat| kind(stat.filesystem_type()));
    let found = format!("{dir} on {kind}, {:.1} GiB free", gib(free));
    if free < FLOOR_BYTES && has_vms {
        Check::warn(name, found, full)
    } else if free < FLOOR_BYTES {
        Check::fail(name, found, remedy)
    } else if free < COMFORT_BYTES {
        Check::warn(name, found, "make room: VMs that fill their disks will find the host's full")
    } else if matches!(kind, "tmpfs" | "nfs") {
        Check::warn(name, found, "choose a local disk with the setting data_dir: this one forgets, or is slow")
    } else {
        Check::ok(name, found)
    }
}

fn run(dir: &Utf8Path) -> Check {
    let name = "run folder";
    let held = existing(dir);
    match writable(held) {
        Ok(()) => Check::ok(name, dir.as_str()),
        Err(error) => {
            Check::fail(name, format!("{held} can't be written: {error}"), "choose another with the setting run_dir")
        }
    }
}

/// The folder itself or, where it is still to be made, the nearest one above it that exists.
fn existing(dir: &Utf8Path) -> &Utf8Path {
    dir.ancestors().find(|dir| dir.is_dir()).unwrap_or(Utf8Path::new("/"))
}

fn writable(dir: &Utf8Path) -> io::Result<()> {
    let probe = dir.join(format!(".tiffin-doctor-{}", hex::encode(rand::random::<[u8; 6]>())));
    fs::create_dir(&probe)?;
    fs::remove_dir(&probe)
}

#[allow(clippy::cast_precision_loss)] // Shown with one decimal.
fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

fn kind(fs: FsType) -> &'static str {
    match fs {
        statfs::EXT4_SUPER_MAGIC => "ext4",
        statfs::XFS_SUPER_MAGIC => "xfs",
        statfs::BTRFS_SUPER_MAGIC => "btrfs",
        statfs::OVERLAYFS_SUPER_MAGIC => "overlay",
        statfs::TMPFS_MAGIC => "tmpfs",
        statfs::NFS_SUPER_MAGIC => "nfs",
        _ => "another filesystem",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    #[test]
    fn a_folder_that_is_still_to_be_made_is_judged_by_the_one_above_it_and_not_made() {
        let folder = tempfile::tempdir().unwrap();
        let dir = Utf8Path::from_path(folder.path()).unwrap().join("not/yet");
        assert_ne!(data(&dir).level, Level::Fail, "{:?}", data(&dir));
        assert!(!dir.exists());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_folder_that_nobody_can_write_is_refused() {
        assert_eq!(data(Utf8Path::new("/proc/tiffin")).level, Level::Fail);
        assert_eq!(run(Utf8Path::new("/proc/tiffin")).level, Level::Fail);
    }
}
