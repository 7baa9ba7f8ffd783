//! From a file that was received whole to a blob that the image's record names.
//!
//! Invariant: a blob is named only while it is there: the same bytes may be another image's that goes meanwhile.

use std::{
    fs::File,
    io,
    sync::{Arc, atomic::Ordering},
};

use camino::Utf8PathBuf;
use tiffin_image::{
    blob::{self, BlobError},
    convert::{ConvertError, Unpacked},
    kernel::{self, KernelError},
};
use tiffin_store::{Upload, Uploaded};
use tiffin_types::id::Digest;

use super::{Begun, kept, no_room};
use crate::{
    app::{App, images::leaving},
    error::AppError,
    fault,
};

/// How often a blob is made that is removed, as another image's, before it is named.
const TRIES: usize = 3;

/// What became of a new blob.
enum Finish {
    /// The image has it.
    Named,
    /// It isn't there any more; make it again.
    Gone,
}

/// Makes what was received a part of the image.
pub(super) async fn convert(app: &Arc<App>, begun: &Begun) -> Result<(), AppError> {
    let counters = &begun.place.counters;
    counters.converting.store(true, Ordering::Relaxed);
    let _turn = app.images.converting.take(&begun.account).await;
    let file = kept::file(app, &begun.image.id, begun.part);
    if let Some(digest) = &begun.digest {
        check(file.clone(), digest.clone()).await?;
    }
    for _ in 0..TRIES {
        let uploaded = match begun.part {
            Upload::Rootfs => make_filesystem(app, begun, file.clone()).await?,
            Upload::Kernel => keep_kernel(app, file.clone()).await?,
        };
        fault::point("after_upload_converted");
        match finish(app, begun, &uploaded).await? {
            Finish::Named => return Ok(()),
            Finish::Gone => {}
        }
    }
    Err(AppError::Unavailable { code: "busy", message: "images of these files come and go; upload it again".into() })
}

/// Whether the file has the bytes that the client meant.
async fn check(file: Utf8PathBuf, wanted: Digest) -> Result<(), AppError> {
    let found = blocking(move || blob::hash(&mut File::open(file)?)).await?;
    let found = found.map_err(|error| AppError::internal("reading an upload", error))?.digest;
    if found == wanted { Ok(()) } else { Err(AppError::DigestMismatch { wanted, found }) }
}

async fn make_filesystem(app: &Arc<App>, begun: &Begun, upload: Utf8PathBuf) -> Result<Uploaded, AppError> {
    let (counters, work) = (Arc::clone(&begun.place.counters), kept::folder(app, &begun.image.id).join("work"));
    let app = Arc::clone(app);
    let converted = blocking(move || {
        let images = &app.images;
        let mut tell = |done: Unpacked| counters.entries.store(done.entries, Ordering::Relaxed);
        images.converter.convert(&upload, &work, &images.filesystems, &images.limits, &mut tell)
    })
    .await?;
    let converted = converted.map_err(|error| match error {
        ConvertError::Refused(why) => AppError::Unprocessable { code: "bad_filesystem", message: why },
        ConvertError::DiskFull => no_room(),
        error @ (ConvertError::Host(_) | ConvertError::Erofs(_) | ConvertError::Blob(_)) => {
            AppError::internal("making an image of an upload", error)
        }
    })?;
    Ok(Uploaded::Rootfs {
        digest: converted.blob.digest,
        size_bytes: converted.blob.size_bytes,
        rootfs_bytes: converted.unpacked.bytes,
    })
}

async fn keep_kernel(app: &Arc<App>, upload: Utf8PathBuf) -> Result<Uploaded, AppError> {
    let app = Arc::clone(app);
    let kept = blocking(move || -> Result<_, AppError> {
        let file = File::open(&upload).map_err(|error| AppError::internal("reading an upload", error))?;
        kernel::check(&file).map_err(|error| match error {
            KernelError::Refused(why) => AppError::Unprocessable { code: "bad_kernel", message: why.into_owned() },
            error @ KernelError::Io(_) => AppError::internal("checking a kernel", error),
        })?;
        app.images.kernels.put_file(&upload).map_err(|error| match error {
            BlobError::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => no_room(),
            error => AppError::internal("keeping a kernel", error),
        })
    });
    let blob = kept.await??;
    Ok(Uploaded::Kernel { digest: blob.digest, size_bytes: blob.size_bytes })
}

/// Names the new blob in the image's record, and lets go of the one that it had.
async fn finish(app: &Arc<App>, begun: &Begun, uploaded: &Uploaded) -> Result<Finish, AppError> {
    let (image, quota) = (&begun.image, &app.config.images.quota);
    let (store, new) = match uploaded {
        Uploaded::Rootfs { digest, .. } => (&app.images.filesystems, digest),
        Uploaded::Kernel { digest, .. } => (&app.images.kernels, digest),
    };
    let gate = app.images.gate.write().await;
    if !store.contains(new) {
        return Ok(Finish::Gone);
    }
    let finished = app.store.image_upload_finish(&image.id, image.account_id.as_ref(), quota, uploaded).await;
    drop(gate);
    let (unneeded, outcome) = match finished {
        Ok(Ok(replaced)) => (replaced, Ok(Finish::Named)),
        Ok(Err(over)) => (Some(new.clone()), Err(AppError::OverQuota(over))),
        Err(error) => (Some(new.clone()), Err(error.into())),
    };
    leaving::let_go(app, unneeded).await;
    outcome
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, AppError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| AppError::internal("a task of the server panicked", error))
}
