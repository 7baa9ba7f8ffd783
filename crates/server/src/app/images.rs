//! Images: what VMs are made of. What is uploaded to them is in [`super::uploads`].
//!
//! Invariant: a blob goes only when no record names it, and while it goes no VM's record is made from an image
//! ([`Images::gate`]): who has a record has its blob.

mod engines;
mod environments;
pub(crate) mod leaving;

use std::{sync::Arc, time::Duration};

use serde_json::json;
use tiffin_image::{
    blob::{BlobError, BlobStore},
    convert::{Converter, Limits},
};
use tiffin_store::{Image, ImageDeleted, NewImage, NewVm, Partial};
use tiffin_types::{
    account::Scope,
    id::{Digest, ImageId},
    time::Timestamp,
};
use tokio::sync::RwLock;

use super::{
    App,
    auth::Caller,
    uploads::{Ongoing, Progress, Turns, kept},
};
use crate::{config::Config, error::AppError, fault};

pub(super) use engines::kind_for;
pub(super) use environments::{config_of, environment_of};

/// Where images are on this host, and what is being uploaded to them.
pub(crate) struct Images {
    pub(crate) filesystems: BlobStore,
    pub(crate) kernels: BlobStore,
    pub(super) converter: Converter,
    /// What a conversion may use.
    pub(super) limits: Limits,
    /// Held to read while a VM's record is made from an image's, to write while a record and its blobs go.
    pub(crate) gate: RwLock<()>,
    pub(crate) ongoing: Ongoing,
    /// Blobs that may be unneeded.
    pub(crate) leaving: leaving::Leaving,
    environments: environments::Environments,
    /// One conversion at a time: each takes a processor and as much disk as it may.
    pub(super) converting: Turns,
}

impl Images {
    /// The images below the data folder.
    pub(crate) fn open(config: &Config, converter: Converter) -> Result<Self, BlobError> {
        let dir = config.data_dir.join("images");
        Ok(Self {
            filesystems: BlobStore::open(&dir)?,
            kernels: BlobStore::open_kernels(&dir)?,
            converter,
            limits: Limits {
                entries: config.images.max_entries,
                bytes: config.images.max_rootfs_bytes,
                leave_free_bytes: config.images.min_free_disk_bytes,
                time: config.images.convert_timeout.max(Duration::from_secs(1)),
            },
            gate: RwLock::default(),
            ongoing: Ongoing::new(config.images.uploads_in_flight),
            leaving: leaving::Leaving::default(),
            environments: environments::Environments::default(),
            converting: Turns::default(),
        })
    }
}

/// An image to be made; its fields are within their ranges.
pub(crate) struct ImageRequest {
    pub(crate) name: String,
    pub(crate) description: String,
    /// Whether it is to be everybody's.
    pub(crate) shared: bool,
}

/// An image and what is uploaded to it.
pub(crate) struct ImageNow {
    pub(crate) image: Image,
    /// How far an upload is that is under way.
    pub(crate) progress: Option<Progress>,
    /// What can be gone on with.
    pub(crate) kept: Vec<KeptUpload>,
    /// Whether what it has was found damaged on this host.
    pub(crate) is_damaged: bool,
}

/// What is kept of an upload that broke off.
pub(crate) struct KeptUpload {
    pub(crate) partial: Partial,
    /// When it is removed.
    pub(crate) expires_at: Timestamp,
}

/// Makes the record of an image, to which a filesystem can be uploaded then.
pub(crate) async fn image_create(app: &App, caller: &Caller, request: ImageRequest) -> Result<ImageNow, AppError> {
    caller.require(if request.shared { Scope::Admin } else { Scope::Write })?;
    let new = NewImage {
        account_id: (!request.shared).then(|| caller.account_id.clone()),
        name: request.name,
        description: request.description,
        digest: None,
        size_bytes: 0,
        rootfs_bytes: 0,
        config: json!({}),
    };
    let image = match request.shared {
        true => app.store.image_insert(new).await?,
        false => {
            let made = app.store.image_insert_within(new, &caller.account_id, &app.config.images.quota).await?;
            made.map_err(AppError::OverQuota)?
        }
    };
    tracing::info!(image_id = %image.id, account_id = %caller.account_id, "image {} created", image.id);
    Ok(ImageNow { image, progress: None, kept: Vec::new(), is_damaged: false })
}

/// The images that the caller may use.
pub(crate) async fn image_list(app: &App, caller: &Caller) -> Result<Vec<ImageNow>, AppError> {
    caller.require(Scope::Read)?;
    let images = app.store.image_list(&caller.account_id).await?;
    let partials = app.store.image_partials_of(&caller.account_id).await?;
    Ok(images.into_iter().map(|image| now(app, image, &partials)).collect())
}

/// One of them.
pub(crate) async fn image_get(app: &App, caller: &Caller, id: &ImageId) -> Result<ImageNow, AppError> {
    caller.require(Scope::Read)?;
    let image = find(app, caller, id).await?;
    Ok(now(app, image, &app.store.image_partials_of(&caller.account_id).await?))
}

fn now(app: &App, image: Image, partials: &[Partial]) -> ImageNow {
    let progress = app.images.ongoing.progress(&image.id);
    let is_kept = |partial: &&Partial| {
        partial.image_id == image.id && progress.is_none_or(|progress| progress.part != partial.part)
    };
    let kept_ms = i64::try_from(app.config.images.partial_kept.as_millis()).unwrap_or(i64::MAX);
    let kept = partials
        .iter()
        .filter(is_kept)
        .map(|partial| KeptUpload { partial: partial.clone(), expires_at: partial.updated_at.plus_millis(kept_ms) });
    let is_damaged = image.digest.as_ref().is_some_and(|digest| app.images.filesystems.is_damaged(digest))
        || image.kernel_digest.as_ref().is_some_and(|digest| app.images.kernels.is_damaged(digest));
    ImageNow { kept: kept.collect(), image, progress, is_damaged }
}

/// Makes an image the default: everybody's, where it is everybody's and the key has the scope admin; else the account's.
pub(crate) async fn image_set_default(app: &App, caller: &Caller, id: &ImageId) -> Result<(), AppError> {
    caller.require(Scope::Write)?;
    let image = find(app, caller, id).await?;
    if image.digest.is_none() {
        return Err(AppError::Conflict {
            code: "no_rootfs",
            message: "the image has no filesystem yet: upload it first".into(),
            details: json!({}),
        });
    }
    let done = if image.account_id.is_none() && caller.require(Scope::Admin).is_ok() {
        let done = app.store.image_set_default(id).await?;
        app.store.image_clear_default_of(&caller.account_id).await?;
        done
    } else {
        app.store.image_set_default_of(&caller.account_id, id).await?
    };
    if done { Ok(()) } else { Err(AppError::NotFound("image")) }
}

/// Removes an image that nothing is made of.
pub(crate) async fn image_delete(app: &Arc<App>, caller: &Caller, id: &ImageId) -> Result<(), AppError> {
    caller.require(Scope::Write)?;
    may_change(caller, &find(app, caller, id).await?)?;
    let (work, id) = (Arc::clone(app), id.clone());
    app.run(async move {
        let deleted = {
            let _gate = work.images.gate.write().await;
            work.store.image_delete(&id).await?
        };
        let blobs = match deleted {
            ImageDeleted::Deleted(blobs) => blobs,
            ImageDeleted::Absent => return Err(AppError::NotFound("image")),
            ImageDeleted::InUse { vms, snapshots } => return Err(in_use(vms, snapshots)),
            ImageDeleted::IsDefault => {
                return Err(AppError::Conflict {
                    code: "is_default",
                    message: "the image is a default one: make another one the default first".into(),
                    details: json!({}),
                });
            }
            ImageDeleted::Uploading => return Err(uploading()),
        };
        fault::point("after_image_delete");
        tracing::info!(image_id = %id, "image {id} deleted");
        kept::forget_image(&work, &id).await;
        leaving::let_go(&work, blobs).await;
        Ok(())
    })
    .await
}

fn in_use(vms: i64, snapshots: i64) -> AppError {
    let count = |number: i64, noun: &str| format!("{number} {noun}{}", if number == 1 { "" } else { "s" });
    let users = match (vms, snapshots) {
        (vms, 0) => count(vms, "VM"),
        (0, snapshots) => count(snapshots, "snapshot"),
        (vms, snapshots) => format!("{} and {}", count(vms, "VM"), count(snapshots, "snapshot")),
    };
    AppError::Conflict {
        code: "in_use",
        message: format!("the image is in use by {users}: delete them first"),
        details: json!({ "vms": vms, "snapshots": snapshots }),
    }
}

pub(super) fn uploading() -> AppError {
    AppError::Conflict {
        code: "upload_in_progress",
        message: "something is being uploaded to the image: wait for its end".into(),
        details: json!({}),
    }
}

/// The image, if the caller sees it.
pub(super) async fn find(app: &App, caller: &Caller, id: &ImageId) -> Result<Image, AppError> {
    app.store.image_get(&caller.account_id, id).await?.ok_or(AppError::NotFound("image"))
}

/// Everybody's images are the administrator's to change.
pub(super) fn may_change(caller: &Caller, image: &Image) -> Result<(), AppError> {
    if image.account_id.is_none() { caller.require(Scope::Admin) } else { Ok(()) }
}

/// The image that a VM is to be made of: the one named, or the default.
pub(super) async fn image_for(app: &App, caller: &Caller, id: Option<&ImageId>) -> Result<(Image, Digest), AppError> {
    let image = match id {
        Some(id) => app
            .store
            .image_get(&caller.account_id, id)
            .await?
            .ok_or_else(|| AppError::field("imageId", "names no image of yours: GET /v1/images lists them"))?,
        None => app.store.image_default_of(&caller.account_id).await?.ok_or_else(|| {
            AppError::field("imageId", "is needed, as there is no default image: name one, or build the default one")
        })?,
    };
    match image.digest.clone() {
        Some(digest) => Ok((image, digest)),
        None => Err(AppError::field("imageId", "names an image that has no filesystem yet: upload it first")),
    }
}

/// Refuses to make VMs of what was found damaged.
pub(super) fn require_whole(app: &App, new: &NewVm) -> Result<(), AppError> {
    let kernel_is_damaged = new.kernel_digest.as_ref().is_some_and(|kernel| app.images.kernels.is_damaged(kernel));
    if kernel_is_damaged || app.images.filesystems.is_damaged(&new.image_digest) {
        return Err(AppError::Unprocessable {
            code: "image_damaged",
            message: "the image is damaged on the host's disk: upload it again, or have an administrator do it where it is shared; until then use another one".into(),
        });
    }
    Ok(())
}

/// Whether the VM's image still has the content that it is to be made of, asked with the gate held to read.
pub(super) async fn still_has(app: &App, caller: &Caller, new: &NewVm) -> Result<(), AppError> {
    let is_it =
        |image: &Image| image.digest.as_ref() == Some(&new.image_digest) && image.kernel_digest == new.kernel_digest;
    match app.store.image_get(&caller.account_id, &new.image_id).await? {
        Some(image) if is_it(&image) => Ok(()),
        Some(_) | None => Err(AppError::field("imageId", "names an image that was deleted or replaced just now")),
    }
}
