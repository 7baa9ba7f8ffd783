//! What is kept of uploads that broke off: `<images>/uploads/<image id>/<part>`, and a record of each.
//!
//! Invariants: a file without a record is removed, a record without a file is none. What is kept counts against the account's
//! quota, or isn't kept; it goes with the image, with an upload from the beginning, and after a time. Whoever changes it has the
//! image's place ([`super::Ongoing`]).

use std::io;

use camino::Utf8PathBuf;
use tiffin_store::{Partial, Upload};
use tiffin_types::{
    id::{AccountId, ImageId},
    time::Timestamp,
};

use crate::{
    app::App,
    error::{AppError, chain},
};

/// Where what is uploaded to an image is received and worked on.
pub(crate) fn folder(app: &App, id: &ImageId) -> Utf8PathBuf {
    all(app).join(id.as_str())
}

/// The folder of these folders.
fn all(app: &App) -> Utf8PathBuf {
    app.config.data_dir.join("images/uploads")
}

/// The file of an upload.
pub(super) fn file(app: &App, id: &ImageId, part: Upload) -> Utf8PathBuf {
    folder(app, id).join(part.as_str())
}

/// What is kept of an upload; the length of its file counts.
pub(super) async fn find(app: &App, id: &ImageId, part: Upload) -> Result<Option<Partial>, AppError> {
    let Some(partial) = app.store.image_partial_get(id, part).await? else { return Ok(None) };
    Ok(length(app, id, part).await?.map(|received_bytes| Partial { received_bytes, ..partial }))
}

async fn length(app: &App, id: &ImageId, part: Upload) -> Result<Option<u64>, AppError> {
    match tokio::fs::metadata(file(app, id, part)).await {
        Ok(metadata) => Ok(Some(metadata.len())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(AppError::internal("looking at what is kept of an upload", error)),
    }
}

/// Keeps what came, as far as the account's quota has room for it; how much that is.
pub(super) async fn keep(app: &App, id: &ImageId, account: Option<&AccountId>, part: Upload) -> Result<u64, AppError> {
    let received = length(app, id, part).await?.unwrap_or(0);
    let quota = &app.config.images.quota;
    if received > 0 && app.store.image_partial_keep(id, part, account, quota, received).await? {
        return Ok(received);
    }
    discard(app, id, part).await?;
    Ok(0)
}

/// Removes what is kept of an upload; nothing is fine.
pub(super) async fn discard(app: &App, id: &ImageId, part: Upload) -> Result<(), AppError> {
    // The record last: what is left of a removal that was cut short is found by it.
    match tokio::fs::remove_file(file(app, id, part)).await {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(AppError::internal("removing what is kept of an upload", error));
        }
        _ => {}
    }
    app.store.image_partial_remove(id, part).await?;
    // It stays where something else is in it.
    let _ = tokio::fs::remove_dir(folder(app, id)).await;
    Ok(())
}

/// Removes all that is kept of uploads to an image whose record is gone.
pub(crate) async fn forget_image(app: &App, id: &ImageId) {
    if let Err(error) = remove_folder(folder(app, id)).await {
        tracing::warn!(image_id = %id, error = chain(&error), "what was uploaded to image {id} stays until the next start");
    }
}

/// Removes what nobody has gone on with for the configured time.
pub(crate) async fn expire(app: &App) -> Result<(), AppError> {
    let kept = i64::try_from(app.config.images.partial_kept.as_millis()).unwrap_or(i64::MAX);
    for (partial, _) in app.store.image_partials_before(Timestamp::now().plus_millis(-kept)).await? {
        let (id, part) = (&partial.image_id, partial.part);
        let Some(_still) = app.images.ongoing.keep_still(id) else { continue };
        discard(app, id, part).await?;
        tracing::info!(image_id = %id, "what was kept of an upload to image {id} is gone: nobody went on with it");
    }
    Ok(())
}

/// Before the server listens: brings records and files together, and removes what is of no use.
pub(crate) async fn settle(app: &App) -> Result<(), AppError> {
    let mut known = Vec::new();
    for (partial, account) in app.store.image_partials_before(Timestamp::now()).await? {
        let (id, part) = (partial.image_id, partial.part);
        let kept = keep(app, &id, account.as_ref(), part).await?;
        tracing::info!(image_id = %id, "{kept} bytes are kept of an upload to image {id}");
        if kept > 0 {
            known.push(file(app, &id, part));
        }
    }
    let all = all(app);
    let cleared = tokio::task::spawn_blocking(move || {
        for folder in entries(&all)? {
            if !known.iter().any(|file| file.starts_with(&folder)) {
                remove(&folder)?;
                continue;
            }
            for inside in entries(&folder)?.iter().filter(|inside| !known.contains(inside)) {
                remove(inside)?;
            }
        }
        io::Result::Ok(())
    });
    match cleared.await.map_err(|error| AppError::internal("clearing uploads", error))? {
        Ok(()) => {}
        Err(error) => tracing::warn!(%error, "what interrupted uploads left can't be removed now"),
    }
    Ok(())
}

fn entries(folder: &camino::Utf8Path) -> io::Result<Vec<Utf8PathBuf>> {
    match folder.read_dir_utf8() {
        Ok(entries) => entries.map(|entry| Ok(entry?.into_path())).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

fn remove(path: &camino::Utf8Path) -> io::Result<()> {
    if path.symlink_metadata()?.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) }
}

async fn remove_folder(folder: Utf8PathBuf) -> io::Result<()> {
    match tokio::fs::remove_dir_all(folder).await {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
