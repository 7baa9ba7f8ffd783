//! Blobs on their way out: what records named until just now, and maybe nothing names any more.
//!
//! ```text
//!   a record goes, or names another blob -> VMs booted ahead of the old one go -> the engine lets go -> the blob goes
//! ```
//!
//! Invariants: a blob goes only when no record names it, with the gate held to write, and after the engine has let go of it: else
//! its room would stay taken, by nobody's image. What can't go yet is tried again on a timer; what is forgotten by a killed
//! server, the sweep of the next one finds.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
};

use tiffin_image::blob::BlobError;
use tiffin_types::id::Digest;

use crate::{
    app::App,
    error::{AppError, chain},
};

/// The blobs that may be unneeded.
#[derive(Default)]
pub(crate) struct Leaving(Mutex<BTreeSet<Digest>>);

impl Leaving {
    /// Has these looked at when the timer next comes round.
    pub(crate) fn add(&self, blobs: impl IntoIterator<Item = Digest>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend(blobs);
    }

    fn take(&self) -> BTreeSet<Digest> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Removes those of the blobs that nothing needs any more, now or, where that can't be, later. The caller doesn't hold the gate.
pub(crate) async fn let_go(app: &Arc<App>, blobs: impl IntoIterator<Item = Digest>) {
    app.images.leaving.add(blobs);
    release_leaving(app).await;
}

/// Looks at every blob that may be unneeded.
pub(crate) async fn release_leaving(app: &Arc<App>) {
    let blobs = app.images.leaving.take();
    if blobs.is_empty() {
        return;
    }
    if let Err(error) = release(app, &blobs).await {
        tracing::warn!(error = error.inside(), "blobs that were replaced or deleted stay for now");
        app.images.leaving.add(blobs);
    }
}

async fn release(app: &Arc<App>, blobs: &BTreeSet<Digest>) -> Result<(), AppError> {
    for digest in blobs {
        if !app.store.image_has_blob(digest).await? {
            // Before the gate is taken: it takes its time, and from now on nobody is given one.
            app.pool.forget_blob(app, digest).await;
        }
    }
    let _gate = app.images.gate.write().await;
    let used = app.store.digests_in_use().await?;
    for digest in blobs.iter().filter(|digest| !used.contains(digest)) {
        if !remove(app, digest).await {
            app.images.leaving.add([digest.clone()]);
        }
    }
    Ok(())
}

/// Removes a blob that no record names, once the engine has let go of it; whether it is gone. The caller holds the gate to write.
pub(crate) async fn remove(app: &App, digest: &Digest) -> bool {
    match app.engine.image_release(digest).await {
        Ok(true) => {}
        // It belongs to a VM that is still being destroyed.
        Ok(false) => return false,
        Err(error) => {
            tracing::warn!(%digest, error = chain(&error), "the engine can't let go of an image now");
            return false;
        }
    }
    let (stores, gone) = ([app.images.filesystems.clone(), app.images.kernels.clone()], digest.clone());
    let removed = tokio::task::spawn_blocking(move || {
        stores.iter().try_for_each(|store| store.remove(&gone)).map_err(|error: BlobError| chain(&error))
    });
    match removed.await.unwrap_or_else(|error| Err(error.to_string())) {
        Ok(()) => {
            tracing::info!(%digest, "removed a blob that nothing needs");
            true
        }
        Err(error) => {
            tracing::warn!(%digest, error, "a blob that nothing needs can't be removed now");
            false
        }
    }
}
