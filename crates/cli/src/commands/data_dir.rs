//! The data folder: nobody else's to read, and one server's at a time.
//!
//! The database and the VMs' disks in it have the process's default mode, so the folder itself keeps others out. Two
//! servers on one folder would adopt and sweep each other's VMs. The lock is the kernel's, on an open file: it ends with
//! the process, however that ends. Monitors don't inherit it.

use std::{
    fs::{DirBuilder, File, Permissions, TryLockError},
    io,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::Path,
};

use anyhow::{Context, bail};

const NAME: &str = "server.lock";

/// Makes the data folder where it is missing, and sees to it that only its owner can look into it.
pub(crate) fn private_folder(path: &Path) -> anyhow::Result<()> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.and_then(|()| keep_others_out(path)).with_context(|| format!("making {} private", path.display()))
}

fn keep_others_out(path: &Path) -> io::Result<()> {
    let mode = path.metadata()?.permissions().mode();
    if mode & 0o077 == 0 { Ok(()) } else { std::fs::set_permissions(path, Permissions::from_mode(0o700)) }
}

/// Held as long as this lives.
#[derive(Debug)]
pub(crate) struct DataLock(#[allow(dead_code, reason = "it is the open file that holds the lock")] File);

impl DataLock {
    /// Takes the lock of a data folder that exists.
    ///
    /// # Errors
    /// When another process has it.
    pub(crate) fn take(data_dir: &Path) -> anyhow::Result<Self> {
        let path = data_dir.join(NAME);
        let file = File::options().create(true).truncate(false).write(true).open(&path);
        let file = file.with_context(|| format!("opening {}", path.display()))?;
        match file.try_lock() {
            Ok(()) => Ok(Self(file)),
            Err(TryLockError::WouldBlock) => bail!("a server runs on {}: stop it first", data_dir.display()),
            Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("locking {}", path.display())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_others_could_read_is_closed_to_them() {
        let folder = tempfile::tempdir().unwrap();
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
        std::fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
        private_folder(folder.path()).unwrap();
        let new = folder.path().join("a/b");
        private_folder(&new).unwrap();
        assert_eq!((mode(folder.path()), mode(&new)), (0o700, 0o700));
    }

    #[test]
    fn the_second_is_refused_until_the_first_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let first = DataLock::take(folder.path()).unwrap();
        assert!(DataLock::take(folder.path()).unwrap_err().to_string().contains("a server runs"));
        drop(first);
        assert!(DataLock::take(folder.path()).is_ok());
    }
}
