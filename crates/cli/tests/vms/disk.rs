//! A disk that a test can fill without filling the machine's: a loop-mounted file. Needs `mkfs.ext4` and `fallocate`.

use std::{fs, path::PathBuf, process::Command};

/// A small filesystem of its own, whose free space the test sets.
pub(crate) struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    /// One of that size; its backing file takes what is written to it.
    pub(crate) fn new(mib: u64) -> Self {
        let disk = Self(tempfile::tempdir().unwrap());
        let image = disk.0.path().join("image");
        fs::File::create(&image).unwrap().set_len(mib << 20).unwrap();
        fs::create_dir(disk.at()).unwrap();
        // Without the share that ext4 keeps for root, which the server would live on.
        tool(Command::new("mkfs.ext4").args(["-q", "-m", "0"]).arg(&image));
        tool(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(disk.at()));
        disk
    }

    /// Where it is mounted.
    pub(crate) fn at(&self) -> PathBuf {
        self.0.path().join("mount")
    }

    /// What is free.
    pub(crate) fn free_kib(&self) -> u64 {
        let stat = nix::sys::statvfs::statvfs(&self.at()).unwrap();
        (stat.blocks_available() * stat.fragment_size()) >> 10
    }

    /// Takes or gives back space, so that this much is free.
    pub(crate) fn leave(&self, mib: u64) {
        let ballast = self.at().join("ballast");
        if ballast.exists() {
            fs::remove_file(&ballast).unwrap();
        }
        let taken = (self.free_kib() >> 10).saturating_sub(mib);
        if taken > 0 {
            tool(Command::new("fallocate").args(["-l", &format!("{taken}M")]).arg(&ballast));
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.at()).status();
    }
}

fn tool(command: &mut Command) {
    assert!(command.status().unwrap().success(), "{command:?}");
}
