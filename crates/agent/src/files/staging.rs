//! Unfinished files and folders: made beside what they are to become, under a name of their own, and moved into place
//! by a rename once they are whole.
//!
//! Invariant: what is unfinished is locked by the process that makes it (`flock`), so it goes away when that ends: by
//! itself, or, when it was killed, swept by the agent right after that (or, had the whole guest ended, by the next
//! operation in that folder). Names that begin with [`PREFIX`] belong to this: they are neither listed nor packed, and no
//! archive may hold one.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use tiffin_protocol::{Failure, FailureCode, FileAction};

use super::{place, refusal};
use crate::request::failure;

/// How the names of unfinished things begin.
pub const PREFIX: &str = ".tiffin-part-";

/// How often to try another name: one may be taken by a sweep of the very moment it is made.
const ATTEMPTS: usize = 8;

/// Something unfinished; removed when dropped.
#[derive(Debug)]
pub struct Part {
    path: PathBuf,
    file: Flock<File>,
    is_folder: bool,
    placed: bool,
}

impl Part {
    /// A folder in `folder` that only its user may enter.
    ///
    /// # Errors
    /// A [`Failure`].
    pub fn folder(folder: &Path) -> Result<Self, Failure> {
        Self::make(folder, true, |path| {
            DirBuilder::new().mode(0o700).create(path)?;
            OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW).open(path)
        })
    }

    /// A file in `folder` that only its user may read.
    ///
    /// # Errors
    /// A [`Failure`].
    pub fn file(folder: &Path) -> Result<Self, Failure> {
        Self::make(folder, false, |path| OpenOptions::new().write(true).create_new(true).mode(0o600).open(path))
    }

    fn make(folder: &Path, is_folder: bool, open: impl Fn(&Path) -> io::Result<File>) -> Result<Self, Failure> {
        for _ in 0..ATTEMPTS {
            let path = folder.join(format!("{PREFIX}{:016x}", RandomState::new().build_hasher().finish()));
            let file = open(&path).map_err(|error| refusal(&error, folder))?;
            let Ok(file) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else { continue };
            let part = Part { path, file, is_folder, placed: false };
            if part.is_there() {
                return Ok(part);
            }
        }
        Err(failure(FailureCode::Internal, "no name for an unfinished file was left alone"))
    }

    /// Whether its name still leads to it.
    fn is_there(&self) -> bool {
        let named = fs::symlink_metadata(&self.path).map(|metadata| (metadata.dev(), metadata.ino()));
        let own = self.file.metadata().map(|metadata| (metadata.dev(), metadata.ino()));
        matches!((named, own), (Ok(named), Ok(own)) if named == own)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file, to be written.
    pub fn as_file(&self) -> &File {
        &self.file
    }

    /// Moves it to `path`.
    ///
    /// # Errors
    /// A [`Failure`].
    pub fn place(mut self, path: &Path) -> Result<(), Failure> {
        fs::rename(&self.path, path).map_err(|error| refusal(&error, path))?;
        self.placed = true;
        Ok(())
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if !self.placed {
            remove(&self.path, self.is_folder);
        }
    }
}

fn remove(path: &Path, is_folder: bool) {
    // Nothing can be done about what remains, and its name says what it is.
    let _ = if is_folder { fs::remove_dir_all(path) } else { fs::remove_file(path) };
}

/// Whether `name` is one of an unfinished thing.
pub fn is_part(name: &[u8]) -> bool {
    name.starts_with(PREFIX.as_bytes())
}

/// Removes from `folder` what was left unfinished by processes that are no more.
pub fn sweep(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if !is_part(entry.file_name().as_encoded_bytes()) {
            continue;
        }
        let path = entry.path();
        // Not to be stuck at a FIFO, nor to follow a link, of that name.
        let opened = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(&path);
        let Ok(file) = opened else { continue };
        if let Ok(locked) = Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            remove(&path, locked.metadata().is_ok_and(|metadata| metadata.is_dir()));
        }
    }
}

/// Sweeps wherever `action` may have made something unfinished: folders that weren't there then may be there now.
pub fn sweep_for(action: &FileAction) {
    let (FileAction::Unpack { dest: path, .. }
    | FileAction::Write { path, .. }
    | FileAction::Pack { path }
    | FileAction::List { path, .. }
    | FileAction::Read { path }) = action;
    if let Ok(place) = place::to_be(path) {
        let inside = |folder: &&Path| folder.starts_with(place::ROOT);
        place.existing.ancestors().take_while(inside).filter(|folder| folder.is_dir()).for_each(sweep);
    }
}

/// `path`, when it is a folder, else the one that it is in.
pub fn folder_of(path: &Path) -> Option<&Path> {
    if path.is_dir() { Some(path) } else { path.parent().filter(|parent| parent.starts_with(place::ROOT)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_lives_as_long_as_its_process_and_then_is_swept() {
        let folder = tempfile::tempdir().unwrap();
        let part = Part::folder(folder.path()).unwrap();
        fs::write(part.path().join("inside"), "x").unwrap();
        sweep(folder.path());
        assert!(part.path().join("inside").exists(), "locked, so it is left alone");
        let path = part.path().to_owned();
        drop(part);
        assert!(!path.exists());
        fs::create_dir(&path).unwrap();
        fs::write(path.join("inside"), "x").unwrap();
        fs::write(folder.path().join(format!("{PREFIX}0")), "x").unwrap();
        fs::write(folder.path().join("kept"), "x").unwrap();
        sweep(folder.path());
        let left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["kept"]);
    }

    #[test]
    fn a_placed_part_stays() {
        let folder = tempfile::tempdir().unwrap();
        let part = Part::file(folder.path()).unwrap();
        let target = folder.path().join("target");
        part.place(&target).unwrap();
        assert!(target.exists());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
