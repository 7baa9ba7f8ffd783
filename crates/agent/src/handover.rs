//! What the agent lays out for the processes that it starts for itself, and what they hand back: the scripts' preludes,
//! and one slip for each operation.
//!
//! Invariants
//! * The folder is root's and can't be listed: nobody else makes, replaces or removes anything in it.
//! * A slip is read through the descriptor that the agent made it by, and no more of it than was asked for. Its user may
//!   write anything to it: nothing in it is to be trusted.
//!
//! It is a tmpfs of its own, so that a full disk doesn't cost an answer. Where that can't be mounted, it is a folder.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::mount::{MsFlags, mount};
use nix::unistd::fchown;

/// Where it is.
const FOLDER: &str = "/run/tiffin-handover";

/// What slips may take of the guest's memory, all together.
const TMPFS: &str = "mode=0711,size=64m";

/// The folder.
#[derive(Debug)]
pub struct Handover {
    folder: PathBuf,
    next: AtomicU64,
}

/// A file that a process of some user fills in.
#[derive(Debug)]
pub struct Slip {
    path: PathBuf,
    file: File,
}

impl Handover {
    /// Makes the folder, with `files` in it that everybody may read.
    ///
    /// # Errors
    /// When it can't be made; what needs it is refused then.
    pub fn set_up(files: &[(&str, &str)]) -> io::Result<Self> {
        let folder = Path::new(FOLDER);
        crate::jobs::make_private(folder)?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        if mount(Some("tiffin"), folder, Some("tmpfs"), flags, Some(TMPFS)).is_err() {
            // What an earlier run left.
            fs::remove_dir_all(folder)?;
            crate::jobs::make_private(folder)?;
            fs::set_permissions(folder, Permissions::from_mode(0o711))?;
        }
        for (name, text) in files {
            fs::write(folder.join(name), text)?;
            fs::set_permissions(folder.join(name), Permissions::from_mode(0o444))?;
        }
        Ok(Handover { folder: folder.to_owned(), next: AtomicU64::new(0) })
    }

    /// Where the file `name` of [`Handover::set_up`] is.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// An empty slip for a process of that user.
    ///
    /// # Errors
    /// When no file can be made.
    pub fn slip(&self, uid: u32, gid: u32) -> io::Result<Slip> {
        let path = self.folder.join(format!("slip{}", self.next.fetch_add(1, Ordering::Relaxed)));
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
        let slip = Slip { path, file };
        fchown(&slip.file, Some(uid.into()), Some(gid.into()))?;
        Ok(slip)
    }
}

impl Slip {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its last `limit` bytes, and whether there were more before them.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn tail(&self, limit: u64) -> io::Result<(Vec<u8>, bool)> {
        let length = self.file.metadata()?.len();
        let start = length.saturating_sub(limit);
        let mut bytes = vec![0; usize::try_from(length - start).unwrap_or(0)];
        let mut filled = 0;
        // Short where somebody cuts it at this very moment.
        while filled < bytes.len() {
            match self.file.read_at(&mut bytes[filled..], start + filled as u64) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        bytes.truncate(filled);
        Ok((bytes, start > 0))
    }
}

impl Drop for Slip {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}
