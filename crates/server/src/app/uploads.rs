//! Uploads of filesystems and kernels to images: received to a file, checked, turned into a blob, named in the record.
//!
//! ```text
//!   begin (record) -> <images>/uploads/<id>/upload -> converter or kernel check -> blob -> record -> the old blob goes
//! ```
//!
//! Invariants: an image keeps what it has until the new part is whole; it has one upload at a time; what is received is
//! bounded in bytes, in time between two pieces and by the disk's free space. An upload that the server's end cuts short is
//! found by its record ([`crate::reconcile`]); nothing of it is used.

use std::{
    collections::{HashMap, hash_map::Entry},
    fs::File,
    io,
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use camino::{Utf8Path, Utf8PathBuf};
use futures_util::{Stream, StreamExt};
use tiffin_image::{
    blob::BlobError,
    convert::{ConvertError, Unpacked},
    kernel::{self, KernelError},
};
use tiffin_store::{Image, Upload, Uploaded};
use tiffin_types::{
    account::Scope,
    id::{Digest, ImageId},
};
use tokio::{io::AsyncWriteExt, sync::OwnedSemaphorePermit, time::Instant};

use super::{
    App,
    auth::Caller,
    images::{find, leaving, may_change, uploading},
};
use crate::{
    error::{AppError, chain},
    fault,
};

/// A client that brings less than this in the time that a body may take is too slow.
const PROGRESS_BYTES: u64 = 256 << 10;
/// Free space is looked at each time that so many bytes were received.
const LOOK_EVERY: u64 = 64 << 20;

/// How often a blob is made that is removed, as another image's, before it is named.
const TRIES: usize = 3;

/// How far an upload is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Progress {
    /// Bytes that came.
    pub(crate) received_bytes: u64,
    /// Bytes that the client said would come.
    pub(crate) expected_bytes: Option<u64>,
    /// Whether all have come, and they are being made an image of.
    pub(crate) converting: bool,
    /// Files of the filesystem that were unpacked.
    pub(crate) converted_entries: u64,
}

#[derive(Default)]
struct Counters {
    received: AtomicU64,
    expected: Option<u64>,
    converting: AtomicBool,
    entries: AtomicU64,
}

/// The uploads that are under way, by image.
#[derive(Default)]
pub(crate) struct Ongoing(Arc<Mutex<HashMap<ImageId, Arc<Counters>>>>);

impl Ongoing {
    /// How far the upload to that image is, if there is one.
    pub(super) fn progress(&self, id: &ImageId) -> Option<Progress> {
        let counters = self.hold().get(id).cloned()?;
        Some(Progress {
            received_bytes: counters.received.load(Ordering::Relaxed),
            expected_bytes: counters.expected,
            converting: counters.converting.load(Ordering::Relaxed),
            converted_entries: counters.entries.load(Ordering::Relaxed),
        })
    }

    /// Whether there is one.
    pub(crate) fn contains(&self, id: &ImageId) -> bool {
        self.hold().contains_key(id)
    }

    /// Notes the upload to an image until the place is dropped; refuses a second one.
    fn take(&self, id: &ImageId, expected: Option<u64>, permit: OwnedSemaphorePermit) -> Result<UploadPlace, AppError> {
        match self.hold().entry(id.clone()) {
            Entry::Occupied(_) => Err(uploading()),
            Entry::Vacant(free) => {
                let counters = free.insert(Arc::new(Counters { expected, ..Counters::default() })).clone();
                Ok(UploadPlace { id: id.clone(), counters, ongoing: Arc::clone(&self.0), _permit: permit })
            }
        }
    }

    fn hold(&self) -> MutexGuard<'_, HashMap<ImageId, Arc<Counters>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The right to upload to an image.
pub(crate) struct UploadPlace {
    id: ImageId,
    counters: Arc<Counters>,
    ongoing: Arc<Mutex<HashMap<ImageId, Arc<Counters>>>>,
    _permit: OwnedSemaphorePermit,
}

impl Drop for UploadPlace {
    fn drop(&mut self) {
        self.ongoing.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
    }
}

/// An upload that may begin.
pub(crate) struct Begun {
    image: Image,
    part: Upload,
    limit: u64,
    place: UploadPlace,
}

/// Where what is uploaded to an image is received.
pub(crate) fn folder(app: &App) -> Utf8PathBuf {
    app.config.data_dir.join("images/uploads")
}

/// Bytes that an upload may have.
pub(crate) fn upload_limit(app: &App, part: Upload) -> u64 {
    match part {
        Upload::Rootfs => app.config.images.max_rootfs_bytes,
        Upload::Kernel => app.config.images.max_kernel_bytes,
    }
}

/// Whether an upload of so many bytes, as far as the client says, may begin. Nothing of the body was read.
pub(crate) async fn image_upload_admit(
    app: &App,
    caller: &Caller,
    id: &ImageId,
    part: Upload,
    expected: Option<u64>,
) -> Result<Begun, AppError> {
    caller.require(Scope::Write)?;
    let image = find(app, caller, id).await?;
    may_change(caller, &image)?;
    let limit = upload_limit(app, part);
    if expected.is_some_and(|bytes| bytes > limit) {
        return Err(too_large(limit));
    }
    let busy = || AppError::Unavailable {
        code: "busy",
        message: "too many uploads are being received at once; try again shortly".into(),
    };
    let permit = Arc::clone(&app.images.places).try_acquire_owned().map_err(|_| busy())?;
    let place = app.images.ongoing.take(id, expected, permit)?;
    enough_room(app, expected.unwrap_or(0))?;
    Ok(Begun { image, part, limit, place })
}

/// Takes a body in and makes it a part of the image. Answers when VMs can be made with it. It runs to its end, or to that
/// of the body, even when the caller goes away.
pub(crate) async fn image_upload<B: AsRef<[u8]> + Send>(
    app: &Arc<App>,
    begun: Begun,
    body: impl Stream<Item = Result<B, AppError>> + Send + 'static,
) -> Result<(), AppError> {
    let work = Arc::clone(app);
    app.run(async move {
        let (id, part) = (begun.image.id.clone(), begun.part.as_str());
        if !work.store.image_upload_begin(&id, begun.part).await? {
            return Err(AppError::NotFound("image"));
        }
        fault::point("after_upload_begin");
        let folder = folder(&work).join(id.as_str());
        let done = upload(&work, &begun, &folder, body).await;
        if let Err(error) = &done {
            failed(&work, &id, error).await;
        } else {
            tracing::info!(image_id = %id, "{part} of image {id} uploaded");
        }
        // What can't be removed now, the next start removes.
        let _ = tokio::fs::remove_dir_all(&folder).await;
        done
    })
    .await
}

/// Writes down that an upload came to nothing; what can't be written now, the reconciler writes.
async fn failed(app: &App, id: &ImageId, error: &AppError) {
    tracing::info!(image_id = %id, error = chain(error), "the upload to image {id} came to nothing");
    let why = match error {
        AppError::Internal { .. } | AppError::Store(_) => "the server failed: upload it again".to_owned(),
        other => other.to_string(),
    };
    if let Err(error) = app.store.image_upload_failed(id, &why).await {
        tracing::warn!(image_id = %id, error = chain(&error), "the end of the upload to image {id} can't be written down");
    }
}

async fn upload<B: AsRef<[u8]>>(
    app: &Arc<App>,
    begun: &Begun,
    folder: &Utf8Path,
    body: impl Stream<Item = Result<B, AppError>>,
) -> Result<(), AppError> {
    let path = folder.join("upload");
    receive(app, begun, &path, body).await?;
    fault::point("after_upload_received");
    for _ in 0..TRIES {
        let uploaded = match begun.part {
            Upload::Rootfs => convert(app, begun, path.clone(), folder.join("work")).await?,
            Upload::Kernel => keep_kernel(app, path.clone()).await?,
        };
        fault::point("after_upload_converted");
        match finish(app, begun, &uploaded).await? {
            Finish::Named => return Ok(()),
            Finish::Gone => {}
        }
    }
    Err(AppError::Unavailable { code: "busy", message: "images of these files come and go; upload it again".into() })
}

async fn receive<B: AsRef<[u8]>>(
    app: &App,
    begun: &Begun,
    path: &Utf8Path,
    body: impl Stream<Item = Result<B, AppError>>,
) -> Result<(), AppError> {
    let (patience, limit, counters) = (app.config.http.body_timeout, begun.limit, &begun.place.counters);
    let folder = path.parent().expect("it is in a folder of its own");
    let disk = |error: io::Error| match error.kind() {
        io::ErrorKind::StorageFull => no_room(),
        _ => AppError::internal("receiving an upload", error),
    };
    tokio::fs::create_dir_all(folder).await.map_err(disk)?;
    let mut file = tokio::fs::File::create(path).await.map_err(disk)?;
    let mut body = pin!(body);
    let (mut received, mut mark, mut deadline) = (0_u64, 0_u64, Instant::now() + patience);
    while let Some(piece) = next(body.as_mut(), deadline).await? {
        let piece = piece.as_ref();
        let before = received;
        received += piece.len() as u64;
        if received > limit {
            return Err(too_large(limit));
        }
        if before / LOOK_EVERY != received / LOOK_EVERY {
            enough_room(app, 0)?;
        }
        if received - mark >= PROGRESS_BYTES {
            (mark, deadline) = (received, Instant::now() + patience);
        }
        file.write_all(piece).await.map_err(disk)?;
        counters.received.store(received, Ordering::Relaxed);
    }
    file.flush().await.map_err(disk)
}

async fn next<B>(
    mut body: std::pin::Pin<&mut impl Stream<Item = Result<B, AppError>>>,
    deadline: Instant,
) -> Result<Option<B>, AppError> {
    match tokio::time::timeout_at(deadline, body.next()).await {
        Ok(piece) => piece.transpose(),
        Err(_) => Err(AppError::BodyTimeout),
    }
}

async fn convert(app: &Arc<App>, begun: &Begun, upload: Utf8PathBuf, work: Utf8PathBuf) -> Result<Uploaded, AppError> {
    let counters = Arc::clone(&begun.place.counters);
    counters.converting.store(true, Ordering::Relaxed);
    let _turn =
        app.images.converting.acquire().await.map_err(|error| AppError::internal("waiting to convert", error))?;
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
            KernelError::Refused(why) => AppError::Unprocessable { code: "bad_kernel", message: why.into() },
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
    let (image, new, quota) = (&begun.image, digest_of(uploaded), &app.config.images.quota);
    let gate = app.images.gate.write().await;
    let store = match uploaded {
        Uploaded::Rootfs { .. } => &app.images.filesystems,
        Uploaded::Kernel { .. } => &app.images.kernels,
    };
    if !store.contains(new) {
        // It was there already, as another image's, and went with that one just now.
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

/// What became of a new blob.
enum Finish {
    /// The image has it.
    Named,
    /// It isn't there any more; make it again.
    Gone,
}

fn digest_of(uploaded: &Uploaded) -> &Digest {
    match uploaded {
        Uploaded::Rootfs { digest, .. } | Uploaded::Kernel { digest, .. } => digest,
    }
}

/// Whether the disk keeps its floor when so many bytes more are on it.
fn enough_room(app: &App, bytes: u64) -> Result<(), AppError> {
    let disk = nix::sys::statvfs::statvfs(app.config.data_dir.as_std_path());
    let disk = disk.map_err(|error| AppError::internal("looking for free space", error))?;
    let free = disk.blocks_available().saturating_mul(disk.fragment_size());
    if free < app.config.images.min_free_disk_bytes.saturating_add(bytes) { Err(no_room()) } else { Ok(()) }
}

fn no_room() -> AppError {
    AppError::Unavailable { code: "no_capacity", message: "the host's disk has no room for the upload".into() }
}

fn too_large(limit: u64) -> AppError {
    AppError::TooLarge(usize::try_from(limit).unwrap_or(usize::MAX))
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, AppError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| AppError::internal("a task of the server panicked", error))
}
