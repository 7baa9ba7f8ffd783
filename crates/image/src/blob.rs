//! The blob store: read-only files, named after the SHA-256 of their bytes. Filesystems and kernels have a folder each.
//!
//! ```text
//!   <dir>/sha256/<64 hex>.erofs     complete, mode 0444, never written again
//!   <dir>/sha256/.incoming-*        being written by a process that holds a lock on it
//!   <dir>/sha256/<64 hex>.erofs.damaged   the blob beside it isn't what its name says
//!   <dir>/kernels/<64 hex>.kernel   the same for kernels
//! ```
//!
//! Invariant: a file gets its final name only when all its bytes are on the disk, so whoever finds the name finds the
//! blob. A process that dies on the way leaves an unlocked `.incoming-*`, which the next [`BlobStore::open`] removes.
//! Who uses a blob is the database's business: [`BlobStore::remove`] asks nobody.

mod damage;

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Read, Seek, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    sync::atomic::{AtomicU64, Ordering},
    time::SystemTime,
};

use camino::{Utf8Path, Utf8PathBuf};
use sha2::{Digest as _, Sha256};
use tiffin_types::id::Digest;

pub use damage::Seen;

const INCOMING: &str = ".incoming-";

/// A blob in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blob {
    /// Its name.
    pub digest: Digest,
    /// Its length, in bytes.
    pub size_bytes: u64,
}

/// The store failed, by what the caller does about it.
#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    /// The disk failed, or is full.
    #[error("{path}")]
    Io {
        /// What was being read or written.
        path: Utf8PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl BlobError {
    fn io(path: &Utf8Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |source| Self::Io { path: path.to_owned(), source }
    }
}

/// The store. Cheap to clone; any number of processes may use one folder at once.
#[derive(Debug, Clone)]
pub struct BlobStore {
    dir: Utf8PathBuf,
    /// What the names end with.
    extension: &'static str,
}

impl BlobStore {
    /// Opens the store of filesystems in `dir` (`<data_dir>/images`), making it where it is missing, and sweeps what
    /// killed writers left.
    ///
    /// # Errors
    /// When the folder can't be made or read.
    pub fn open(dir: &Utf8Path) -> Result<Self, BlobError> {
        Self::open_with(dir.join("sha256"), ".erofs")
    }

    /// The same for kernels.
    ///
    /// # Errors
    /// As [`BlobStore::open`].
    pub fn open_kernels(dir: &Utf8Path) -> Result<Self, BlobError> {
        Self::open_with(dir.join("kernels"), ".kernel")
    }

    fn open_with(dir: Utf8PathBuf, extension: &'static str) -> Result<Self, BlobError> {
        let store = Self { dir, extension };
        fs::create_dir_all(&store.dir).map_err(BlobError::io(&store.dir))?;
        store.sweep()?;
        Ok(store)
    }

    /// Where the blob is, or would be.
    pub fn path(&self, digest: &Digest) -> Utf8PathBuf {
        self.dir.join(format!("{}{}", digest.hex(), self.extension))
    }

    /// Whether the blob is here.
    pub fn contains(&self, digest: &Digest) -> bool {
        self.path(digest).is_file()
    }

    /// Copies a file into the store.
    ///
    /// # Errors
    /// When it can't be read or the store can't be written; nothing is left then.
    pub fn put_file(&self, source: &Utf8Path) -> Result<Blob, BlobError> {
        let mut from = File::open(source).map_err(BlobError::io(source))?;
        let mut incoming = self.incoming()?;
        io::copy(&mut from, &mut incoming.file).map_err(BlobError::io(&incoming.path))?;
        incoming.commit()
    }

    /// A file in the store's folder to write a new blob to; [`Incoming::commit`] makes it one.
    ///
    /// # Errors
    /// When the file can't be made.
    pub fn incoming(&self) -> Result<Incoming, BlobError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        loop {
            let name = format!("{INCOMING}{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
            let path = self.dir.join(name);
            let made = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path);
            let file = match made {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                made => made.map_err(BlobError::io(&path))?,
            };
            file.lock().map_err(BlobError::io(&path))?;
            // Another process may have swept it between its making and its locking.
            if file.metadata().map_err(BlobError::io(&path))?.nlink() > 0 {
                return Ok(Incoming { file, path, store: self.clone() });
            }
        }
    }

    /// Removes a blob. One that is absent is no error; processes that have it open keep it until they close it.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn remove(&self, digest: &Digest) -> Result<(), BlobError> {
        let path = self.path(digest);
        remove_if_there(&path).map_err(BlobError::io(&path))?;
        self.clear_damaged(digest)
    }

    /// Every blob here, in the order of their names.
    ///
    /// # Errors
    /// When the folder can't be read.
    pub fn list(&self) -> Result<Vec<Blob>, BlobError> {
        let mut blobs = Vec::new();
        for entry in self.dir.read_dir_utf8().map_err(BlobError::io(&self.dir))? {
            let entry = entry.map_err(BlobError::io(&self.dir))?;
            let Some(hex) = entry.file_name().strip_suffix(self.extension) else { continue };
            let Ok(digest) = format!("sha256:{hex}").parse::<Digest>() else { continue };
            match entry.metadata() {
                Ok(metadata) => blobs.push(Blob { digest, size_bytes: metadata.len() }),
                // Removed since.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(BlobError::io(entry.path())(error)),
            }
        }
        blobs.sort_by(|a, b| a.digest.cmp(&b.digest));
        Ok(blobs)
    }

    fn sweep(&self) -> Result<(), BlobError> {
        for entry in self.dir.read_dir_utf8().map_err(BlobError::io(&self.dir))? {
            let entry = entry.map_err(BlobError::io(&self.dir))?;
            if !entry.file_name().starts_with(INCOMING) {
                continue;
            }
            // One that can't be opened or locked belongs to somebody who is writing it, or is gone already.
            let Ok(file) = File::open(entry.path()) else { continue };
            if file.try_lock().is_ok() {
                remove_if_there(entry.path()).map_err(BlobError::io(entry.path()))?;
            }
        }
        Ok(())
    }
}

/// A blob on its way in. Dropped without [`Incoming::commit`], it is removed.
#[derive(Debug)]
pub struct Incoming {
    file: File,
    path: Utf8PathBuf,
    store: BlobStore,
}

impl Incoming {
    /// Where to write; the name must stay (truncate the file rather than replace it).
    pub fn path(&self) -> &Utf8Path {
        &self.path
    }

    /// Hashes what was written, makes it durable and gives it its name. A blob of the same bytes that is here already stays,
    /// as it may be mounted, and is as young as a new one; only one that was cut short or found damaged is replaced.
    ///
    /// # Errors
    /// When the disk fails or is full; nothing is left then.
    pub fn commit(mut self) -> Result<Blob, BlobError> {
        let blob = self.settle().map_err(BlobError::io(&self.path))?;
        let (target, dir) = (self.store.path(&blob.digest), &self.store.dir);
        match keep(&target, blob.size_bytes) {
            // Dropping this removes what was written.
            Ok(true) if !self.store.is_damaged(&blob.digest) => return Ok(blob),
            Ok(_) => {}
            Err(error) => return Err(BlobError::io(&target)(error)),
        }
        fs::rename(&self.path, &target).map_err(BlobError::io(&target))?;
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(BlobError::io(dir))?;
        self.store.clear_damaged(&blob.digest)?;
        Ok(blob)
    }

    fn settle(&mut self) -> io::Result<Blob> {
        self.file.flush()?;
        self.file.rewind()?;
        let blob = hash(&mut self.file)?;
        self.file.set_permissions(Permissions::from_mode(0o444))?;
        self.file.sync_all()?;
        Ok(blob)
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        // After a commit the name is gone. What can't be removed now, the next sweep removes.
        let _ = fs::remove_file(&self.path);
    }
}

/// What blob the rest of a file would be.
///
/// # Errors
/// When it can't be read.
pub fn hash(file: &mut File) -> io::Result<Blob> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut size_bytes = 0;
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        hasher.update(&buffer[..read]);
        size_bytes += read as u64;
    }
    Ok(Blob { digest: Digest::from_sha256(hasher.finalize().into()), size_bytes })
}

/// Whether there is a whole blob under that name; it is marked as new.
fn keep(target: &Utf8Path, size_bytes: u64) -> io::Result<bool> {
    let known = match File::open(target) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        opened => opened?,
    };
    if known.metadata()?.len() != size_bytes {
        return Ok(false);
    }
    known.set_modified(SystemTime::now())?;
    // Removed meanwhile.
    Ok(known.metadata()?.nlink() > 0)
}

fn remove_if_there(path: &Utf8Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}
