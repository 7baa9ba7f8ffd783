//! Whether blobs are still what their names say, and which aren't.
//!
//! Invariant: a blob that was found damaged is marked by a file beside it (`<blob>.damaged`), for every process and server to see,
//! until a whole one takes its place or it is removed. Its bytes stay: VMs may be using the parts that are right.

use std::{
    fs::{self, File},
    io::{self, Read},
};

use camino::{Utf8Path, Utf8PathBuf};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use sha2::{Digest as _, Sha256};
use tiffin_types::id::Digest;

use super::{BlobError, BlobStore, remove_if_there};

const DAMAGED: &str = ".damaged";
const PIECE: usize = 1 << 20;

/// What a look at a blob came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// It is what its name says.
    Whole,
    /// It isn't.
    Damaged,
    /// It isn't there, or whoever looked was told to leave off.
    Unknown,
}

impl BlobStore {
    /// Reads a blob from the disk, past the cache, and compares it with its name. `go_on` is told of the bytes so far; it may wait, and
    /// ends the look with `false`.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn look(&self, digest: &Digest, mut go_on: impl FnMut(u64) -> bool) -> Result<Seen, BlobError> {
        let path = self.path(digest);
        let mut file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Seen::Unknown),
            opened => opened.map_err(BlobError::io(&path))?,
        };
        let forget = |file: &File| {
            // What stays cached is seen as it was read before: a smaller chance to notice, no failure.
            let _ = posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        };
        forget(&file);
        let (mut hasher, mut buffer, mut seen) = (Sha256::new(), vec![0; PIECE], 0);
        loop {
            let read = match file.read(&mut buffer) {
                Ok(read) => read,
                // The disk says itself that it can't be read.
                Err(error) if error.raw_os_error() == Some(nix::errno::Errno::EIO as i32) => return Ok(Seen::Damaged),
                Err(error) => return Err(BlobError::io(&path)(error)),
            };
            if read == 0 {
                break;
            }
            hasher.update(&buffer[..read]);
            seen += read as u64;
            if !go_on(seen) {
                return Ok(Seen::Unknown);
            }
        }
        forget(&file);
        let found = Digest::from_sha256(hasher.finalize().into());
        Ok(if found == *digest { Seen::Whole } else { Seen::Damaged })
    }

    /// Remembers that a blob is damaged.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn mark_damaged(&self, digest: &Digest) -> Result<(), BlobError> {
        let mark = self.mark(digest);
        File::create(&mark).map(drop).map_err(BlobError::io(&mark))
    }

    /// Whether the blob was found damaged.
    pub fn is_damaged(&self, digest: &Digest) -> bool {
        self.mark(digest).exists()
    }

    /// How many blobs were found damaged.
    pub fn damaged_count(&self) -> usize {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        entries.filter(|entry| entry.file_name().to_str().is_some_and(|name| name.ends_with(DAMAGED))).count()
    }

    /// The blob is whole again, or gone.
    pub(super) fn clear_damaged(&self, digest: &Digest) -> Result<(), BlobError> {
        let mark = self.mark(digest);
        remove_if_there(&mark).map_err(BlobError::io(&mark))
    }

    fn mark(&self, digest: &Digest) -> Utf8PathBuf {
        Utf8Path::new(&format!("{}{DAMAGED}", self.path(digest))).to_owned()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn a_damaged_blob_is_noticed_marked_and_replaced_by_a_whole_one() {
        let folder = tempfile::tempdir().unwrap();
        let dir = Utf8Path::from_path(folder.path()).unwrap();
        let store = BlobStore::open(dir).unwrap();
        let source = dir.join("source");
        fs::write(&source, vec![7; 3 << 20]).unwrap();
        let digest = store.put_file(&source).unwrap().digest;
        assert_eq!(store.look(&digest, |_| true).unwrap(), Seen::Whole);
        assert_eq!(store.look(&digest, |seen| seen < 2 << 20).unwrap(), Seen::Unknown);
        assert!(!store.is_damaged(&digest));

        let blob = File::options().write(true).open(store.path(&digest)).unwrap();
        blob.write_at(&[8], 2 << 20).unwrap();
        assert_eq!(store.look(&digest, |_| true).unwrap(), Seen::Damaged);
        store.mark_damaged(&digest).unwrap();
        assert!(store.is_damaged(&digest) && BlobStore::open(dir).unwrap().is_damaged(&digest));
        assert_eq!((store.damaged_count(), store.list().unwrap().len()), (1, 1));

        assert_eq!(store.put_file(&source).unwrap().digest, digest);
        assert_eq!((store.is_damaged(&digest), store.look(&digest, |_| true).unwrap()), (false, Seen::Whole));
        store.mark_damaged(&digest).unwrap();
        store.remove(&digest).unwrap();
        assert_eq!((store.damaged_count(), store.look(&digest, |_| true).unwrap()), (0, Seen::Unknown));
    }
}
