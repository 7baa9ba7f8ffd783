//! Images as the engine uses them: mounted once, read-only, shared by all VMs of the image.
//!
//! Invariant: an image is mounted, and unmounted as nobody uses it, with one lock held; it is mounted only for a VM whose folder is
//! whole by then, and such a VM keeps it mounted. So an image that was let go of isn't mounted again by a start that was cut off.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use tiffin_types::{id::Digest, vm::VmSpec};
use tokio::sync::Mutex;

use super::{HostConfig, blocking};
use crate::{
    EngineError,
    host::mount::{detach, is_mounted, mount_image, unmount},
    monitor::launch::{self, SPEC},
};

pub(super) struct Images {
    blobs: PathBuf,
    kernels: PathBuf,
    mounts: PathBuf,
    /// Which file is mounted: a blob that was damaged is replaced by another file.
    mounted_files: PathBuf,
    mounting: Mutex<()>,
}

impl Images {
    pub(super) fn new(config: &HostConfig) -> Self {
        Self {
            blobs: config.data_dir.join("images/sha256"),
            kernels: config.data_dir.join("images/kernels"),
            mounts: config.run_dir.join("images"),
            mounted_files: config.run_dir.join("image-files"),
            mounting: Mutex::new(()),
        }
    }

    fn blob(&self, digest: &Digest) -> PathBuf {
        self.blobs.join(format!("{}.erofs", digest.hex()))
    }

    /// Refuses an image that isn't in the blob store.
    pub(super) fn require(&self, digest: &Digest) -> Result<(), EngineError> {
        require(&self.blob(digest), "filesystem", digest)
    }

    /// The kernel that an image came with, as a file.
    pub(super) fn kernel(&self, digest: &Digest) -> Result<PathBuf, EngineError> {
        let blob = self.kernels.join(format!("{}.kernel", digest.hex()));
        require(&blob, "kernel", digest).map(|()| blob)
    }

    /// The image's filesystem as a file, for a machine that mounts it itself.
    pub(super) fn file(&self, digest: &Digest) -> Result<PathBuf, EngineError> {
        self.require(digest).map(|()| self.blob(digest))
    }

    /// The folder that shows the image; mounted now if it wasn't. Refused when the VM in `folder`, for which it is, was removed
    /// meanwhile.
    pub(super) async fn mounted(&self, digest: &Digest, folder: &Path) -> Result<PathBuf, EngineError> {
        self.require(digest)?;
        let (blob, at, note) =
            (self.blob(digest), self.mounts.join(digest.hex()), self.mounted_files.join(digest.hex()));
        let _one_at_a_time = self.mounting.lock().await;
        if !folder.join(SPEC).exists() {
            return Err(EngineError::Absent);
        }
        blocking(move || {
            let metadata = fs::metadata(&blob)?;
            let file = format!("{} {}", metadata.dev(), metadata.ino());
            let is_another = fs::read_to_string(&note).is_ok_and(|mounted| mounted != file);
            if is_another && is_mounted(&at) {
                // VMs that run have what they began with, in namespaces of their own.
                detach(&at)?;
            }
            if !is_mounted(&at) {
                if let Some(folder) = note.parent() {
                    fs::create_dir_all(folder)?;
                }
                fs::write(&note, file)?;
                mount_image(&blob, &at)?;
            }
            Ok(at)
        })
        .await
        .map_err(|e| EngineError::host("mounting the image", e))
    }

    /// Unmounts an image unless a VM below `vms` was made of it; whether it isn't mounted now.
    pub(super) async fn let_go(&self, digest: &Digest, vms: &Path) -> Result<bool, EngineError> {
        let (at, note) = (self.mounts.join(digest.hex()), self.mounted_files.join(digest.hex()));
        let (digest, vms) = (digest.clone(), vms.to_owned());
        let _one_at_a_time = self.mounting.lock().await;
        let released = blocking(move || {
            if is_used(&digest, &vms)? {
                return Ok(false);
            }
            if at.try_exists()? {
                release(&at)?;
            }
            match fs::remove_file(&note) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(true),
            }
        });
        released.await.map_err(|e| EngineError::host("unmounting the image", e))
    }

    /// Unmounts the images that no VM uses.
    pub(super) fn release_unused(&self, used: &[Digest]) {
        let Ok(entries) = fs::read_dir(&self.mounts) else { return };
        for at in entries.filter_map(|entry| Some(entry.ok()?.path())) {
            let is_used = used.iter().any(|digest| at.ends_with(digest.hex()));
            if !is_used && let Err(error) = release(&at) {
                tracing::warn!("unmounting an image at {}: {error}", at.display());
            }
        }
    }
}

fn require(blob: &Path, what: &str, digest: &Digest) -> Result<(), EngineError> {
    match blob.try_exists() {
        Ok(true) => Ok(()),
        Ok(false) => Err(EngineError::Invalid(format!("the image's {what} {digest} is not on this host"))),
        Err(error) => Err(EngineError::host("looking for the image", error)),
    }
}

fn is_used(digest: &Digest, vms: &Path) -> io::Result<bool> {
    for entry in fs::read_dir(vms)? {
        // Those without a spec are on their way in or out.
        let spec: Option<VmSpec> = launch::read(&entry?.path(), SPEC)?;
        if spec.is_some_and(|spec| spec.image == *digest || spec.kernel.as_ref() == Some(digest)) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Unmounts one image and removes its mount point.
pub(super) fn release(at: &Path) -> io::Result<()> {
    unmount(at)?;
    fs::remove_dir(at)
}
