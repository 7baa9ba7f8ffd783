//! Looking at blobs again, slowly: disks forget, and a damaged filesystem would be mounted unseen.
//!
//! Invariant: it takes no more of the disk than the configuration gives it. What it finds it marks, and those who make VMs refuse a
//! marked image; what runs of it is left alone.

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use tiffin_image::blob::{Blob, BlobError, BlobStore, Seen};
use tiffin_types::id::Digest;

use crate::{
    app::App,
    error::{AppError, chain},
};

/// Looks at every blob that is needed, again and again.
pub(super) async fn scrub_blobs(app: Arc<App>) {
    if app.config.images.scrub_bytes_per_s == 0 {
        return;
    }
    loop {
        if let Err(error) = pass(&app).await {
            tracing::error!(error = error.inside(), "images can't be looked at again now");
        }
        tokio::time::sleep(app.config.images.scrub_every).await;
    }
}

async fn pass(app: &Arc<App>) -> Result<(), AppError> {
    let used = app.store.digests_in_use().await?;
    let stores = [app.images.filesystems.clone(), app.images.kernels.clone()];
    let listed = tokio::task::spawn_blocking(move || {
        let blobs =
            stores.into_iter().map(|store| Ok(store.list()?.into_iter().map(move |blob| (store.clone(), blob))));
        blobs.collect::<Result<Vec<_>, BlobError>>()
    });
    let listed = listed.await.map_err(|error| AppError::internal("looking at an image again", error))?;
    let listed = listed.map_err(|error| AppError::internal("listing the images", error))?;
    let mut blobs: Vec<_> = listed.into_iter().flatten().filter(|(_, blob)| used.contains(&blob.digest)).collect();
    // A large one keeps the many small ones waiting for long, not the other way round.
    blobs.sort_by_cached_key(|(store, blob)| store.path(&blob.digest).metadata().map_or(0, |file| file.len()));
    for (store, Blob { digest, .. }) in blobs {
        if !store.is_damaged(&digest) && is_damaged(app, &store, &digest).await? {
            app.pool.forget_blob(app, &digest).await;
        }
    }
    Ok(())
}

/// Whether the blob is damaged; it is marked then.
async fn is_damaged(app: &Arc<App>, store: &BlobStore, digest: &Digest) -> Result<bool, AppError> {
    let (work, store, digest) = (Arc::clone(app), store.clone(), digest.clone());
    let looked = tokio::task::spawn_blocking(move || {
        let began = Instant::now();
        let seen = store.look(&digest, |bytes| {
            // At this pace so many bytes take so long.
            let due = Duration::from_millis(bytes.saturating_mul(1000) / work.config.images.scrub_bytes_per_s);
            thread::sleep(due.saturating_sub(began.elapsed()));
            !work.shutdown.is_cancelled()
        })?;
        if seen != Seen::Damaged {
            return Ok(false);
        }
        tracing::error!(%digest, "the image {digest} is damaged on this host's disk: upload or build it again, and look at the disk");
        store.mark_damaged(&digest).map(|()| true)
    });
    let looked: Result<bool, BlobError> =
        looked.await.map_err(|error| AppError::internal("looking at an image again", error))?;
    Ok(looked.unwrap_or_else(|error| {
        tracing::error!(error = chain(&error), "an image can't be looked at again now");
        false
    }))
}
