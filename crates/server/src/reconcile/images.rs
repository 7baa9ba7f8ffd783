//! Images: uploads that nobody works on any more, and blobs that nothing needs.

use std::time::{Duration, SystemTime};

use tiffin_image::{
    blob::{BlobError, BlobStore},
    default_image,
};
use tiffin_types::id::Digest;

use crate::{
    app::{App, images::leaving, imports, uploads},
    error::{AppError, chain},
};

/// What an image says whose upload was cut short.
const INTERRUPTED: &str =
    "the upload was interrupted by an end of the server: go on with what is kept of it, or upload it again";
/// A younger blob may be on its way to a record: a build of the default image keeps it before it registers it.
const YOUNG: Duration = Duration::from_secs(3600);

/// Before the server listens, once the engine has adopted what runs: clears what uploads that an earlier server didn't end have
/// left, and removes the blobs that no record names.
pub(crate) async fn settle_images(app: &App) -> Result<(), AppError> {
    settle_uploads(app).await?;
    uploads::kept::settle(app).await?;
    imports::settle(app).await;
    sweep_blobs(app).await
}

/// Ends the uploads in records that nobody works on, and forgets those that nobody has gone on with.
pub(super) async fn settle_uploads(app: &App) -> Result<(), AppError> {
    for id in app.store.image_uploads_unfinished().await? {
        if !app.images.ongoing.contains(&id) {
            app.store.image_upload_failed(&id, INTERRUPTED).await?;
            tracing::warn!(image_id = %id, "the upload to image {id} was interrupted");
        }
    }
    uploads::kept::expire(app).await
}

/// Removes the blobs that no record names, young ones aside.
pub(super) async fn sweep_blobs(app: &App) -> Result<(), AppError> {
    // No record is made of an image while its blob may go.
    let _gate = app.images.gate.write().await;
    let mut used = app.store.digests_in_use().await?;
    let data_dir = app.config.data_dir.clone();
    let stores = [app.images.filesystems.clone(), app.images.kernels.clone()];
    let listed = tokio::task::spawn_blocking(move || {
        // Built, and maybe not in this database yet.
        used.extend(default_image::recorded(&data_dir).map(|image| image.digest));
        let mut unused = Vec::new();
        for store in stores {
            match unused_in(&store, &used) {
                Ok(digests) => unused.extend(digests),
                Err(error) => tracing::warn!(error = chain(&error), "blobs that nothing needs can't be removed now"),
            }
        }
        unused
    });
    let unused = listed.await.map_err(|error| AppError::internal("sweeping blobs", error))?;
    for digest in unused {
        leaving::remove(app, &digest).await;
    }
    Ok(())
}

fn unused_in(store: &BlobStore, used: &[Digest]) -> Result<Vec<Digest>, BlobError> {
    let is_old = |path: &camino::Utf8Path| {
        let modified = path.symlink_metadata().and_then(|metadata| metadata.modified());
        modified.is_ok_and(|at| SystemTime::now().duration_since(at).is_ok_and(|age| age > YOUNG))
    };
    let blobs = store.list()?.into_iter().map(|blob| blob.digest);
    Ok(blobs.filter(|digest| !used.contains(digest) && is_old(&store.path(digest))).collect())
}
